"""Corpora in every format, and independent ways to measure what is in them."""

import csv
import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq

from hfkit.corpus.cache import encode_corpus
from hfkit.corpus.documents import END, Example
from hfkit.corpus.files import find_corpus
from hfkit.options import DataOptions

TEXTS = [
    'A first text, with "quotes"; and commas.',
    "Zwei Zeilen,\ndie zweite mit\teinem Tab – é.\n",
    "三つ目の文書。🎉👩‍👩‍👧 and a separator:\u2028here, \x85 and \x0b, which end no line.",
    "  spaces before and after  ",
    "x" * 9000 + " a long word, and a piece of its own",
]


def write(path, texts=TEXTS, kind=None, column="text", gz=False) -> str:
    """Write texts in the format that the name ends with, or in `kind`."""
    rows = [{"number": i, column: text} for i, text in enumerate(texts)]
    table = pa.table({"number": range(len(texts)), column: texts})
    match kind or path.name.split(".", 1)[1]:
        case "txt" | "md":
            path.write_text(END.join(texts), newline="")
        case "tsv":  # without quoting: no text may have a tab or a line break
            path.write_text("".join(f"{i}\t{text}\n" for i, text in [("number", column), *enumerate(texts)]))
        case "csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, ["number", column])
                writer.writeheader()
                writer.writerows(rows)
        case "json":
            path.write_text(json.dumps(rows))
        case "data":
            path.write_text(json.dumps({"version": "1", "data": rows}))
        case "pretty":
            path.write_text(json.dumps({"version": "1", "data": rows}, indent=2))
        case "jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows)))
        case "parquet":
            pq.write_table(table, path, row_group_size=2)
        case "arrow":
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        case "stream":
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
    if gz:
        path.write_bytes(gzip.compress(path.read_bytes()))
    return str(path)


_SCRAPS = [
    *"word Wörter don't we'll 1234567 a1b2 … !? -- ( ) _ 's e\u0301".split(),
    "x" * 40,
    *("  ", "\n\n", *"    \n\t\r\x0b\x1c\x85\xa0\u3000\u2028\u200b"),
    *"漢字 かな。 한국어 हिन्दी ไทย عربي 🎉 👩‍👩‍👧 \U000e0001 <| |> <|endoftext".split(),
]


def scrawl(seed: int) -> str:
    """A random text with everything that a cut may meet: words, runs of white space, scripts, signs, and END."""
    draw, parts = random.Random(seed), []
    scraps = draw.sample(_SCRAPS, draw.randint(3, len(_SCRAPS)))
    while sum(map(len, parts)) < 30_000:
        parts += draw.choices(scraps, k=draw.randint(1, 2000))
        match draw.randrange(6):
            case 0:
                parts.append(draw.choice(" \n\t\u3000") * draw.randint(1, 9000))
            case 1:
                parts.append(draw.choice(["a", "漢", "7", "=", "ab ", "!\x1c ", "a.", "é'"]) * draw.randint(1, 9000))
            case 2:
                parts.append(END)
    return "".join(parts)


def longest_common(sample: list[str], documents: list[list[str]]) -> int:
    """Words of the longest run that is in both."""
    best = 0
    for document in documents:
        before = [0] * (len(document) + 1)
        for word in sample:
            row = [0] * (len(document) + 1)
            for place, other in enumerate(document, 1):
                row[place] = before[place - 1] + 1 if word == other else 0
            best, before = max(best, *row), row
    return best


def share_of(sample: list[str], documents: list[list[str]], length: int) -> float:
    """The share of the sample's runs of `length` words that are in a document."""
    runs, *others = [
        [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
        for words in [sample, *documents]
    ]
    known = set().union(*others)
    return sum(run in known for run in runs) / len(runs) if runs else 0.0


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def prepare(source, tokenizer, folder=None, **options):
    """Tokenize a corpus, into `folder` or the cache."""
    return encode_corpus(find_corpus(source), tokenizer, DataOptions(**options), folder)


def whole(texts, tokenizer) -> list[int]:
    """The tokens of texts, each encoded at once and followed by the end of text."""
    encoded = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts)
    return [i for ids in encoded for i in [*ids, tokenizer.eos_token_id]]


def talk(*turns) -> Example:
    """A conversation from (role, text) turns."""
    return Example({"messages": [{"role": role, "content": text} for role, text in turns]}, "a.jsonl, line 7")
