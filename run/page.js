'use strict';
// Draws what page.py has put into #data. Every text becomes a text node: nothing of it is read as HTML.
const data = JSON.parse(document.getElementById('data').textContent);
const $ = id => document.getElementById(id);

function el(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  node.append(...children.filter(child => child !== null && child !== undefined && child !== ''));
  return node;
}

function svg(name, attributes, text) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function short(x) {  // a number in few letters
  if (typeof x !== 'number') return '\u2013';
  const size = Math.abs(x);
  if (size && (size < 1e-3 || size >= 1e6)) return x.toExponential(size < 1e-3 ? 1 : 2).replace('e+', 'e');
  return String(size >= 1000 ? Math.round(x) : +x.toPrecision(4));
}

// ---- curves: a chart of every panel, all with one cursor

const SIZE = {left: 44, right: 10, top: 8, bottom: 20, height: 170};
let width = 0;  // of a chart; all are equal
const reference = data.runs.reduce((a, b) => (b.axes.step || []).length > (a.axes.step || []).length ? b : a);
let cursor = null;  // a row of the reference run
const charts = data.panels.map(panel => ({panel, log: panel.log}));

function nearest(xs, x) {  // place of the nearest of ascending numbers
  let low = 0, high = xs.length - 1;
  while (high - low > 1) { const mid = (low + high) >> 1; if (xs[mid] < x) low = mid; else high = mid; }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
}

function ticks(low, high, count, log) {
  const found = [];
  if (log) {
    const decades = Math.log10(high / low), factors = decades < 2 ? [1, 2, 5] : [1];
    const stride = Math.max(1, Math.ceil(decades / 5));
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e += stride)
      for (const f of factors) if (f * 10 ** e >= low && f * 10 ** e <= high) found.push(f * 10 ** e);
    return found;
  }
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const unit = [1, 2, 2.5, 5, 10].find(u => u * power >= raw) * power;
  for (let i = Math.ceil(low / unit - 1e-9); i * unit <= high + unit * 1e-9; i++) found.push(+(i * unit).toPrecision(12));
  return found;
}

function pathOf(xs, ys) {  // at most the first, least, greatest and last point of a pixel column
  let d = '', column = null, part = [];
  const flush = () => {
    if (!part.length) return;
    let least = part[0], most = part[0];
    for (const p of part) { if (p[1] < least[1]) least = p; if (p[1] > most[1]) most = p; }
    const kept = [...new Set([part[0], least, most, part[part.length - 1]])].sort((a, b) => a[2] - b[2]);
    for (const [x, y] of kept) d += (d ? 'L' : 'M') + x.toFixed(1) + ' ' + y.toFixed(1);
  };
  xs.forEach((x, i) => {
    if (Math.round(x) !== column) { flush(); column = Math.round(x); part = []; }
    part.push([x, ys[i], i]);
  });
  flush();
  return d;
}

function axisOf(chart) {
  return chart.panel.axis || document.querySelector('input[name=axis]:checked').value;
}

function curvesOf(chart) {  // what a chart has to draw, of both runs
  const found = [], axis = axisOf(chart);
  Object.entries(chart.panel.names).forEach(([name, label], color) => data.runs.forEach((run, which) => {
    const [at, ys, mid, means] = run.series[name] || [[], [], [], []], x = run.axes[axis] || [];
    const points = at.map((row, i) => [x[row], ys[i]]).filter(p => p[0] !== null && p[1] !== null);
    if (!points.length) return;
    found.push({name, label, color, which, points, xs: points.map(p => p[0]), mean: mid.map((row, i) => [x[row], means[i]])});
  }));
  return found;
}

function draw(chart) {
  const {panel, body} = chart, curves = chart.curves = curvesOf(chart);
  body.replaceChildren();
  chart.legend.replaceChildren();
  const names = Object.keys(panel.names);
  const all = curves.flatMap(c => c.points.map(p => p[1]));
  chart.button.hidden = !all.some(y => y > 0);
  chart.button.setAttribute('aria-pressed', chart.log);
  if (!all.some(y => y !== 0)) {
    const why = !all.length ? 'not in metrics.jsonl: ' + names.join(', ') : panel.why || 'always 0';
    body.append(el('div', {class: 'empty'}, why));
    chart.place = null;
    return;
  }
  const {left, right, top, bottom, height} = SIZE;
  const used = chart.log ? all.filter(y => y > 0).sort((a, b) => a - b) : all;
  let low = used.reduce((a, b) => Math.min(a, b)), high = used.reduce((a, b) => Math.max(a, b));
  if (chart.log) low = Math.max(low, used[Math.floor(used.length / 20)] / 2);  // a first step of almost nothing
  if (chart.log ? high <= low : high === low) {
    if (chart.log) { low /= 2; high *= 2; } else { low = Math.min(low, 0); high = high > 0 ? high * 1.1 : high + 1; }
  }
  if (!chart.log) { const edge = (high - low) * 0.04; low -= low === 0 ? 0 : edge; high += edge; }
  const ends = curves.flatMap(c => [c.xs[0], c.xs[c.xs.length - 1]]);
  const begin = ends.reduce((a, b) => Math.min(a, b)), end = ends.reduce((a, b) => Math.max(a, b));
  const scale = chart.log ? Math.log : y => y;
  const X = x => left + (width - left - right) * (end > begin ? (x - begin) / (end - begin) : 0.5);
  const Y = y => height - bottom - (height - top - bottom) * (scale(Math.max(y, low)) - scale(low)) / (scale(high) - scale(low));
  const picture = svg('svg', {viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: 'img'});
  for (const y of ticks(low, high, 5, chart.log)) {
    picture.append(svg('line', {class: 'grid', x1: left, x2: width - right, y1: Y(y), y2: Y(y)}));
    picture.append(svg('text', {x: left - 5, y: Y(y) + 3.5, 'text-anchor': 'end'}, short(y)));
  }
  if (end > begin) for (const x of ticks(begin, end, Math.max(2, width / 90), false)) {
    const anchor = X(x) > width - 25 ? 'end' : 'middle';
    picture.append(svg('text', {x: X(x), y: height - 5, 'text-anchor': anchor}, short(x)));
  }
  for (const curve of curves) {
    const kind = `s${curve.color}${curve.which ? ' other' : ''}`;
    const add = (points, more) => picture.append(svg('path', {
      class: kind + more, d: pathOf(points.map(p => X(p[0])), points.map(p => Y(p[1]))),
    }));
    add(curve.points, curve.mean.length ? ' raw' : '');
    if (curve.mean.length) add(curve.mean, '');
    if (curve.points.length <= 20) for (const [x, y] of curve.points)
      picture.append(svg('circle', {class: kind, cx: X(x), cy: Y(y), r: 2.3}));
    const last = curve.points[curve.points.length - 1][1];
    picture.setAttribute('aria-label', `${panel.title}, by ${axisOf(chart)}; ${curve.label} ends at ${short(last)}`);
  }
  chart.line = svg('line', {class: 'cursor', y1: top, y2: height - bottom, visibility: 'hidden'});
  chart.at = svg('text', {y: top + 3});
  picture.append(chart.line, chart.at);
  chart.place = {X, begin, end, left, width: width - left - right};
  body.append(picture);
  names.forEach((name, color) => {
    if (!curves.some(c => c.name === name)) return;
    const value = el('b', {style: `min-width: ${3.4 * data.runs.length}em`});  // its place is kept: nothing moves
    chart.legend.append(el('span', {class: `s${color}`}, el('i'), panel.names[name], ' ', value));
    curves.filter(c => c.name === name).forEach(c => { c.value = value; });
  });
  const rows = reference.axes[axisOf(chart)] || [];
  const move = row => { cursor = row === null ? null : Math.min(Math.max(row, 0), rows.length - 1); point(); };
  picture.addEventListener('pointermove', event => {
    const frame = picture.getBoundingClientRect(), x = (event.clientX - frame.left) * width / frame.width;
    move(nearest(rows, begin + (end - begin) * (x - left) / (width - left - right)));
  });
  picture.addEventListener('pointerleave', () => move(null));
  picture.addEventListener('keydown', event => {
    const few = Math.max(1, Math.round(rows.length / 200)), now = cursor === null ? rows.length - 1 : cursor;
    const to = {ArrowLeft: now - few, ArrowRight: now + few, Home: 0, End: rows.length - 1, Escape: null}[event.key];
    if (to !== undefined) { event.preventDefault(); move(to); }
  });
}

function point() {  // the values under the cursor, in every chart
  for (const chart of charts) {
    if (!chart.place) continue;
    const x = cursor === null ? null : (reference.axes[axisOf(chart)] || [])[cursor];
    const {X, begin, end} = chart.place, inside = typeof x === 'number' && x >= begin && x <= end;
    chart.line.setAttribute('visibility', inside ? 'visible' : 'hidden');
    if (inside) { chart.line.setAttribute('x1', X(x)); chart.line.setAttribute('x2', X(x)); }
    for (const curve of chart.curves) curve.value.textContent = '';
    if (typeof x === 'number') for (const curve of chart.curves) {
      const known = x >= curve.xs[0] && x <= curve.xs[curve.xs.length - 1];
      const y = known ? curve.points[nearest(curve.xs, x)][1] : null;
      curve.value.textContent += (curve.value.textContent ? ' / ' : '') + short(y);
    }
    const unit = {step: `step ${short(x)}`, completions: `${short(x)} completions`, seconds: `${short(x)} s`};
    chart.at.textContent = inside ? unit[axisOf(chart)] : '';
    if (inside) chart.at.setAttribute('x', X(x) + (X(x) > width / 2 ? -4 : 4));
    chart.at.setAttribute('text-anchor', inside && X(x) > width / 2 ? 'end' : 'start');
  }
}

for (const chart of charts) {
  chart.button = el('button', {type: 'button', title: 'logarithmic scale'}, 'log');
  chart.body = el('div');
  chart.legend = el('div', {class: 'legend'});
  chart.box = el('figure', {}, el('figcaption', {}, chart.panel.title, chart.button), chart.body, chart.legend);
  chart.button.addEventListener('click', () => { chart.log = !chart.log; draw(chart); point(); });
  $('charts').append(chart.box);
}
function drawAll() {
  width = Math.max(charts[0].box.clientWidth - 20, 120);  // once: asking makes the browser lay out all there is
  charts.forEach(draw);
  point();
}
for (const input of document.querySelectorAll('input[name=axis]')) {
  input.disabled = !data.runs.some(run => (run.axes[input.value] || []).some(x => x !== null));  // stage 0 makes none
  input.addEventListener('change', drawAll);
}
let wide = 0;
const fit = () => { if ($('charts').clientWidth !== wide) { wide = $('charts').clientWidth; drawAll(); } };
addEventListener('resize', () => requestAnimationFrame(fit));

data.runs.forEach((run, which) => {
  const name = data.runs.length > 1 ? el('b', {class: which ? 'dash' : 'full'}, run.name) : null;
  $('about').append(el('div', {}, name, `${name ? ' ' : ''}at step ${run.last}: ${run.about || 'nothing is known of it'}`));
});
for (const line of data.told) $('told').append(el('li', {}, line));

// ---- samples: a section of every sampled step, fresh and replayed side by side

const isFinite_ = Number.isFinite;
const every = data.samples.flatMap(([step, groups]) => groups.flat());
const spread = (values, start) => values.reduce((a, b) => Math.max(a, b), start);
let lightest = Infinity, heaviest = -Infinity;
const credits = [];  // the greatest of each completion
for (const c of every) {
  let own = 0;
  for (const w of c.tas_weights || []) {
    lightest = Math.min(lightest, w);
    heaviest = Math.max(heaviest, w);
    own = Math.max(own, Math.abs(w * c.advantage));
  }
  if (isFinite_(own)) credits.push(own);
}
credits.sort((a, b) => a - b);
const most = credits[Math.floor(credits.length * 0.95)] || credits[credits.length - 1] || 1;  // a few may go farther
const DEEP = 0.62, FAR = Math.log(3);  // the deepest shade; the ratio of it

function shade(c, i, mode) {  // -> class, depth in 0..1
  if (mode === 'weight') return ['heavy', heaviest > lightest ? (c.tas_weights[i] - lightest) / (heaviest - lightest) : 0];
  const value = mode === 'ratio' ? Math.log(c.ratios[i]) / FAR : c.tas_weights[i] * c.advantage / most;
  return [value < 0 ? 'down' : 'up', Math.min(1, Math.abs(value))];
}

function tellKey() {
  const mode = $('shade').value, of = name => `rgb(var(--${name}) / ${DEEP})`;
  const [left, right, text] = {
    credit: [of('down'), of('up'), `orange: made less likely, blue: made more likely; deepest from ${short(-most)} and ${short(most)} on`],
    weight: ['transparent', of('weight'), `from ${short(lightest)} to ${short(heaviest)}: how much a token counts of its completion's advantage`],
    ratio: [of('down'), of('up'), 'now / when it was sampled; orange: less likely by now, blue: more; deepest from 1/3 and 3 on'],
  }[mode];
  $('swatch').style.background = `linear-gradient(to right, ${left}, ${mode === 'weight' ? '' : 'transparent, '}${right})`;
  $('key').textContent = text;
}

function tokensOf(c) {
  if (!Array.isArray(c.tokens)) return el('div', {class: 'tokens'}, String(c.completion ?? ''));
  const box = el('div', {class: 'tokens', tabindex: 0, role: 'group', 'aria-label': 'tokens, by arrow keys'});
  const readout = el('p', {class: 'readout'});
  const mode = $('shade').value;
  let here = -1;
  const show = i => {
    if (box.children[here]) box.children[here].classList.remove('here');
    here = i;
    if (!box.children[i]) { readout.textContent = ''; return; }
    box.children[i].classList.add('here');
    readout.textContent = `token ${i} ${JSON.stringify(c.tokens[i])}: advantage ${short(c.advantage)} \u00d7 weight ` +
      `${short(c.tas_weights[i])} = ${short(c.advantage * c.tas_weights[i])}, ratio ${short(c.ratios[i])}`;
  };
  c.tokens.forEach((token, i) => {
    const span = document.createElement('span'), [kind, depth] = shade(c, i, mode);
    span.textContent = token === '' ? '\u00b7' : token.replace(/\n/g, '\u21b5\n');
    if (depth > 0) { span.className = kind; span.style.setProperty('--a', (DEEP * depth).toFixed(3)); }
    box.append(span);
  });
  box.addEventListener('pointerover', event => show([...box.children].indexOf(event.target)));
  box.addEventListener('pointerleave', () => show(-1));
  box.addEventListener('keydown', event => {
    const to = {ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: c.tokens.length - 1, Escape: -1}[event.key];
    if (to !== undefined) { event.preventDefault(); show(Math.min(Math.max(to, -1), c.tokens.length - 1)); }
  });
  return el('div', {}, box, readout);
}

function factsOf(c) {
  const facts = [el('b', {}, `R ${short(c.reward)}`), `A ${short(c.advantage)}`];
  for (const [part, value] of Object.entries(c.reward_parts || {})) facts.push(`${part} ${short(value)}`);
  if (c.kind === 'replayed') facts.push(`${c.age} steps old`);
  if (Array.isArray(c.ratios) && c.ratios.length) {
    const whole = Math.exp(c.ratios.reduce((sum, r) => sum + Math.log(Math.max(r, 1e-9)), 0));
    const least = -spread(c.ratios.map(r => -r), -Infinity);
    if (c.kind === 'replayed')
      facts.push(`ratio ${short(+whole.toPrecision(3))}, its tokens ${short(least)} to ${short(spread(c.ratios, 0))}`);
  }
  return el('div', {class: 'facts'}, ...facts.map(fact => fact instanceof Node ? fact : el('span', {}, fact)));
}

function groupOf(group) {
  const c = group[0], clip = data.clips[c.prompt_id], kind = c.kind || 'fresh';
  const media = el('div');
  if (clip) {
    media.append(el('div', {class: 'clip'}, ...clip.frames.map((src, i) => el('img', {src, alt: `frame ${i + 1} of the clip`}))));
    for (const src of clip.sounds) media.append(el('audio', {src, controls: '', preload: 'metadata'}));
  }
  if (!clip || clip.frames.length + clip.sounds.length === 0) media.append(el('p', {class: 'soft'}, 'its clip was not kept'));
  const badge = text => el('span', {class: 'badge'}, text);
  const mean = isFinite_(c.mean_reward) ? badge(`R\u0304(q) ${short(c.mean_reward)}`) : null;
  return el('article', {class: kind === 'replayed' ? 'replayed' : 'fresh'},
    el('h4', {}, badge(kind), String(c.prompt_id)), media,
    el('p', {class: 'text'}, String(c.prompt ?? '')),
    el('p', {}, c.truth === undefined ? null : badge(`truth: ${c.truth}`), c.tier ? badge(`now ${c.tier}`) : null, mean),
    c.hint ? el('p', {class: 'hint text'}, el('b', {}, 'hint given: '), String(c.hint)) : null,
    !c.hint && c.hinted ? el('p', {class: 'hint'}, 'made with a hint') : null,
    ...group.map(sample => el('div', {class: 'completion'}, factsOf(sample), tokensOf(sample))));
}

const plural = (count, word) => `${count} ${word}${count === 1 ? '' : 's'}`;
const FEW = 2;  // steps shown at first
let limit = FEW;

function render() {
  const step = $('step').value, prompt = $('prompt').value, kind = $('kind').value, words = $('words').value.toLowerCase();
  const fits = g => (!prompt || String(g[0].prompt_id) === prompt) && (!kind || (g[0].kind || 'fresh') === kind) &&
    (!$('hinted').checked || g[0].hinted) &&
    (!words || g.some(c => `${c.prompt} ${c.completion} ${c.hint || ''}`.toLowerCase().includes(words)));
  const found = data.samples.filter(([s]) => !step || String(s) === step)
    .map(([s, groups]) => [s, groups.filter(fits)]).filter(([, groups]) => groups.length).reverse();
  const number = found.reduce((sum, [, groups]) => sum + groups.length, 0);
  $('count').textContent = data.samples.length ? `${plural(number, 'group')} of ${plural(found.length, 'step')}, the newest first`
    : 'no samples: stage 0 keeps none, and other stages keep the first after a step';
  $('steps').replaceChildren(...found.slice(0, limit).map(([s, groups]) =>
    el('section', {}, el('h3', {}, `step ${s}`), el('div', {class: 'groups'}, ...groups.map(groupOf)))));
  $('more').hidden = found.length <= limit;
}

function choices(select, all, values) {
  select.append(el('option', {value: ''}, all), ...values.map(value => el('option', {value}, String(value))));
}
choices($('step'), 'all', data.samples.map(([step]) => step).reverse());
choices($('prompt'), 'all', [...new Set(every.map(c => String(c.prompt_id)))].sort());
$('filter').addEventListener('input', () => { limit = FEW; tellKey(); render(); });
$('filter').addEventListener('submit', event => event.preventDefault());
$('more').addEventListener('click', () => { limit += FEW; render(); });
$('filter').hidden = $('key').parentNode.hidden = !every.length;
fit();  // while nothing else is there to be laid out
tellKey();
render();
