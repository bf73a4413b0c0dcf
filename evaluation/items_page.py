"""
A web page that shows items: frames, sound, question, reasoning, parsed answer, truth.

The page is one file with everything it shows inside. It runs no script, and every text in it is
escaped, because completions are untrusted.
"""

import html

import answers
from data import clips
from data.thumbnails import THUMBNAIL_LIMITS, clip_as_data_uris

STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
article { border-top: 1px solid #bbb; padding: 1em 0 } pre { white-space: pre-wrap; margin: .4em 0 }
img { margin-right: 4px } .wrong b, .failed b { color: #b00 } .right b { color: #070 }
audio { display: block; height: 32px } small { color: #666 }
#only-wrong:checked ~ .right, #only-wrong:checked ~ .open { display: none }
#only-failed:checked ~ .right, #only-failed:checked ~ .wrong, #only-failed:checked ~ .open
{ display: none }
"""
# id of a radio button, its label; the style above hides articles by these ids, without a script
FILTERS = [
    ("everything", "all"),
    ("only-wrong", "wrong and failed"),
    ("only-failed", "failed: no answer"),
]


def write_items_page(path, title, records, roots, max_items, media_config):
    """
    Writes a page of at most `max_items` items, the wrong ones first.

    records        list of dict    as eval.py keeps them in records.jsonl
    roots          {a record's `file`: the folder that its media are relative to}; the page shows
                   no media for files that are not in it
    media_config   MediaConfig     the evaluation's: how much sound, and whether media may lie
                                   outside their folder
    """
    media_config = media_config._replace(**THUMBNAIL_LIMITS)
    ranked = sorted(records, key=rank_of)[:max_items]
    articles = [article(record, roots.get(record["file"]), media_config) for record in ranked]

    only_rows = all(r["score"] is None and r["parsed"] is None for r in records)
    what = "rows, as the model gets them" if only_rows else "items, the wrong ones first"
    page = document(title, f"{len(articles)} of {len(records)} {what}.", articles)
    # "replace": half a surrogate pair has no bytes
    path.write_text(page, encoding="utf-8", errors="replace")


def rank_of(record):
    """Wrong items come first, items without a score last."""
    return record["score"] is None, record["score"] or 0.0


def document(title, subtitle, articles):
    title = escape(title)
    buttons = ""
    for key, label in FILTERS:
        checked = " checked" if key == "everything" else ""
        buttons += f'<input type="radio" name="show" id="{key}"{checked}>'
        buttons += f'<label for="{key}">{label}</label> '
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; media-src data:; style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{STYLE}</style></head><body>\n<h1>{title}</h1>"
        f"<p>{subtitle}</p>\n{buttons}\n" + "\n".join(articles) + "\n</body></html>\n"
    )


def article(record, root, media_config):
    """One item as HTML."""
    kind, score = kind_of(record), record["score"]
    heading = kind if score is None else f"{kind} {score:.2f}"
    completion = record["completion"]
    reasoning, _ = answers.split_completion(completion or "")
    texts = {
        "question": record["prompt"] or record["question"],
        "reasoning": reasoning,
        "completion": None if reasoning else completion,
        "answer": record["parsed"],
        "truth": record["truth"],
        "failure": record["failure"],
    }
    parts = [
        f"<b>{heading}</b> ",
        f"<small>{escape(record['file'])} {escape(record['prompt_id'])}</small>",
        media(record, root, media_config),
    ]
    for name, text in texts.items():
        if text not in (None, ""):
            parts.append(f"<div><small>{name}</small><pre>{escape(text)}</pre></div>")
    return f'<article class="{kind}">{"".join(parts)}</article>'


def kind_of(record):
    """The class of an article, which the style and the filters go by."""
    if record["score"] is None:
        return "open"
    if record["failure"]:
        return "failed"
    return "right" if record["score"] == 1 else "wrong"


def escape(value):
    return html.escape(str(value), quote=True)


def media(record, root, media_config):
    """The frames, pictures and sound of an item, embedded; or the reason why they are not shown."""
    if root is None:
        return "<p><small>media not shown: from an earlier command</small></p>"
    try:
        clip = clips.decode_clip(record, root, media_config)
    except (ValueError, TypeError, AttributeError) as problem:  # a row that breaks the format
        return f"<p><small>{escape(problem)}</small></p>"
    picture_uris, sound_uris = clip_as_data_uris(clip)
    pictures = "".join(f'<img alt="" src="{uri}">' for uri in picture_uris)
    sounds = "".join(f'<audio controls src="{uri}"></audio>' for uri in sound_uris)
    return f"<div>{pictures}{sounds}</div>"
