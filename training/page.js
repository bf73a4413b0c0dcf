'use strict';
// Draws the samples that page.py has put into #data. Every text becomes a text node: nothing is read as HTML.
const data = JSON.parse(document.getElementById('data').textContent);
const $ = id => document.getElementById(id);
const completions = data.samples.flatMap(([step, groups]) => groups.flat());

function el(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children.filter(child => child !== null));
  return node;
}

function short(x) {  // a number in few letters
  if (typeof x !== 'number') return '\u2013';
  const size = Math.abs(x);
  if (size && (size < 1e-3 || size >= 1e6)) return x.toExponential(1);
  return String(+x.toPrecision(size >= 1000 ? 6 : 4));
}

// ---- shades of tokens

const DEEPEST = 0.62;  // opacity
const FARTHEST = Math.log(3);  // log-ratio that gets it
const weights = completions.flatMap(c => c.tas_weights || []);
const least = weights.reduce((a, b) => Math.min(a, b), Infinity);
const most = weights.reduce((a, b) => Math.max(a, b), -Infinity);
// the largest credit of each completion; the deepest shade stands for all above the 95th percentile
const credits = completions.filter(c => c.tas_weights).map(c => Math.abs(c.advantage) * Math.max(0, ...c.tas_weights));
credits.sort((a, b) => a - b);
const credit = credits[Math.floor(credits.length * 0.95)] || 1;

const KEYS = {
  credit: `blue: made more likely, orange: less likely; deepest from \u00b1${short(credit)} on`,
  weight: `how much a token counts of its completion's advantage: from ${short(least)} to ${short(most)}`,
  ratio: 'blue: more likely now than when it was sampled, orange: less likely; deepest from 3 and 1/3 on',
};

function shade(c, i, mode) {  // -> class, depth in 0..1
  if (mode === 'weight') return ['heavy', most > least ? (c.tas_weights[i] - least) / (most - least) : 0];
  const value = mode === 'ratio' ? Math.log(c.ratios[i]) / FARTHEST : c.tas_weights[i] * c.advantage / credit;
  return [value < 0 ? 'down' : 'up', Math.min(1, Math.abs(value))];
}

function tokensOf(c) {
  if (!Array.isArray(c.tokens)) return el('div', {class: 'tokens'}, String(c.completion ?? ''));
  const box = el('div', {class: 'tokens'});
  c.tokens.forEach((token, i) => {
    const [kind, depth] = shade(c, i, $('shade').value);
    const span = el('span', {
      class: kind,
      title: `token ${i}: advantage ${short(c.advantage)} \u00d7 weight ${short(c.tas_weights[i])} = ` +
        `${short(c.advantage * c.tas_weights[i])}, ratio ${short(c.ratios[i])}`,
    }, token === '' ? '\u00b7' : token.replace(/\n/g, '\u21b5\n'));
    span.style.setProperty('--a', (DEEPEST * depth).toFixed(3));
    box.append(span);
  });
  return box;
}

// ---- groups: fresh and replayed side by side

function factsOf(c) {
  const facts = [el('b', {}, `R ${short(c.reward)}`), el('span', {}, `A ${short(c.advantage)}`)];
  for (const [part, value] of Object.entries(c.reward_parts || {})) facts.push(el('span', {}, `${part} ${short(value)}`));
  if (c.kind === 'replayed') {
    facts.push(el('span', {}, `${c.age} steps old`));
    const logs = (c.ratios || []).map(r => Math.log(Math.max(r, 1e-9)));
    const mean = Math.exp(logs.reduce((a, b) => a + b, 0) / (logs.length || 1));
    facts.push(el('span', {}, `mean ratio ${short(+mean.toPrecision(3))}`));
  }
  return el('div', {class: 'facts'}, ...facts);
}

function mediaOf(clip) {
  if (!clip || clip.frames.length + clip.sounds.length === 0) return el('p', {class: 'soft'}, 'its clip was not kept');
  const frames = clip.frames.map((src, i) => el('img', {src, alt: `frame ${i + 1} of the clip`}));
  const sounds = clip.sounds.map(src => el('audio', {src, controls: '', preload: 'metadata'}));
  return el('div', {}, el('div', {class: 'clip'}, ...frames), ...sounds);
}

function groupOf(group) {
  const c = group[0], kind = c.kind || 'fresh';
  const badges = [];
  const badge = text => badges.push(el('span', {class: 'badge'}, text));
  if (c.truth !== undefined) badge(`truth: ${c.truth}`);
  if (c.tier) badge(`tier: ${c.tier}`);
  if (typeof c.mean_reward === 'number') badge(`R\u0304(q) ${short(c.mean_reward)}`);
  const hint = c.hint ? el('p', {class: 'hint text'}, el('b', {}, 'hint: '), String(c.hint)) : null;
  return el('article', {class: kind === 'replayed' ? 'replayed' : 'fresh'},
    el('h4', {}, el('span', {class: 'badge'}, kind), String(c.prompt_id)),
    mediaOf(data.clips[c.prompt_id]),
    el('p', {class: 'text'}, String(c.prompt ?? '')),
    el('p', {}, ...badges),
    hint,
    ...group.map(sample => el('div', {class: 'completion'}, factsOf(sample), tokensOf(sample))));
}

// ---- the filter

const FEW = 2;  // steps shown at first
let limit = FEW;

function render() {
  const step = $('step').value, kind = $('kind').value, words = $('words').value.toLowerCase();
  const fits = group => (!kind || (group[0].kind || 'fresh') === kind) && (!$('hinted').checked || group[0].hinted) &&
    (!words || group.some(c => `${c.prompt_id} ${c.prompt} ${c.completion} ${c.hint || ''}`.toLowerCase().includes(words)));
  const shown = data.samples.filter(([s]) => !step || String(s) === step)
    .map(([s, groups]) => [s, groups.filter(fits)]).filter(([, groups]) => groups.length).reverse();
  const count = shown.reduce((sum, [, groups]) => sum + groups.length, 0);
  $('count').textContent = `groups: ${count}, steps: ${shown.length}, the newest first`;
  $('key').textContent = KEYS[$('shade').value];
  $('steps').replaceChildren(...shown.slice(0, limit).map(([s, groups]) =>
    el('section', {}, el('h3', {}, `step ${s}`), el('div', {class: 'groups'}, ...groups.map(groupOf)))));
  $('more').hidden = shown.length <= limit;
}

$('samples-section').hidden = !completions.length;
for (const value of ['', ...data.samples.map(([step]) => step).reverse()])
  $('step').append(el('option', {value}, String(value || 'all')));
$('filter').addEventListener('input', () => { limit = FEW; render(); });
$('filter').addEventListener('submit', event => event.preventDefault());
$('more').addEventListener('click', () => { limit += FEW; render(); });
render();
