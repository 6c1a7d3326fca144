"""`inspect`: how likely each token of a text is, what would come next, and what each sampling control leaves of it."""

import base64
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hfkit.corpus.encoding import encode, first_tokens
from hfkit.declaration import set_fields
from hfkit.errors import HfkitError
from hfkit.inference.likelihood import score
from hfkit.models.loading import LanguageModel, loaded
from hfkit.options import InspectOptions, ModelOptions
from hfkit.reporting.templates import render

_WARPERS = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper,
            "min_p": MinPLogitsWarper}  # fmt: skip
_SHOWN = {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05}  # where none is asked for
_MOST_WEIGHTS = 30_000_000  # bytes of attention on a page, before base64
_FULL = 12.0  # bits of surprise that get the strongest colour
_SIGNS = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"})
_BYTES = {sign: byte for byte, sign in bytes_to_unicode().items()}


@dataclass(frozen=True)
class Token:
    """One token of the text, and what the model made of it."""

    text: str  # to be read: a space as ·, a newline as ↵, a part of a character as its bytes
    id: int
    bits: float | None  # of surprise; None where nothing comes before
    rank: int | None  # 0: it was the likeliest


@dataclass(frozen=True)
class Inspection:
    """A text as a model sees it. A notebook shows it in colours."""

    model: str
    tokens: list[Token]
    following: list[dict[str, Any]]  # likeliest next tokens: text, id, probability, and one under each control
    left: dict[str, int]  # tokens that each control leaves
    words: list[str]  # of the tokens with the one that begins the text, if it was put before them
    attention: torch.Tensor | None = None  # (layers, heads, words, words); a row's word looks at each column's

    @property
    def bits(self) -> float:
        """Surprise of the whole text."""
        return sum(token.bits or 0.0 for token in self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        tokens = [vars(token) for token in self.tokens]
        return {"model": self.model, "bits": self.bits, "tokens": tokens, "next": self.following, "left": self.left}

    def _repr_html_(self) -> str:
        return render("inspection.html.jinja", view=_view(self), is_page=False, attention=None)


def _told(token: Token) -> str:
    return f"token {token.id}" + ("" if token.bits is None else f": {token.bits:.2f} bits, rank {token.rank}")


def _strength(token: Token) -> float:
    """Of its colour, from 0 to 0.8."""
    return 0.8 * min(1.0, (token.bits or 0.0) / _FULL)


def cell(value: str | float) -> str:
    """A text, or a share; nothing where nothing is left."""
    return value if isinstance(value, str) else f"{value:.2%}" if value else ""


def inspect(
    text: str,
    *,
    model: str | ModelOptions | LanguageModel | None = None,
    options: InspectOptions | None = None,
    **overrides: Any,
) -> Inspection:
    """Look at a text through a model.

    Args:
        text: what is read; its first token is seen after the one that begins a text, if the tokenizer has such.
        model: what `load` returned or takes.
        options: every field of `InspectOptions` is a keyword, too.

    Raises:
        HfkitError: the text is empty or does not fit the model, or the model cannot be loaded.
    """
    options = InspectOptions.make(options, overrides)
    lm = loaded(model)
    if lm.model.config.is_encoder_decoder:
        raise HfkitError(f"{lm.name} has an encoder: inspect a causal model")
    if not text:
        raise HfkitError("there is nothing to inspect: give a text")
    own = encode(text, lm.tokenizer, lm.name)
    begin = first_tokens(lm.tokenizer)
    ids = own if own[: len(begin)] == begin else begin + own
    if len(ids) > (lm.context or len(ids)):
        raise HfkitError(f"the text has {len(ids)} tokens, {lm.name} takes {lm.context}: shorten it")
    output = _run(lm, ids, options.attention)
    targets = torch.tensor([[*ids[1:], ids[-1]]], device=output.logits.device)
    nll, rank = (values[0].tolist() for values in score(output.logits, targets))
    tokens = [
        Token(readable(lm.tokenizer, one), one, *((nll[at - 1] / math.log(2), rank[at - 1]) if at else (None, None)))
        for at, one in enumerate(ids)
    ]
    skipped = len(ids) - len(own)
    following, left = _next(lm, output.logits[:, -1].float(), options)
    attention = None
    if options.attention:
        if not (layers := getattr(output, "attentions", None)) or any(layer is None for layer in layers):
            raise HfkitError(f"{lm.name} does not give its attention: leave it out")
        attention = torch.cat(layers).float().cpu()
    return Inspection(lm.name, tokens[skipped:], following, left, [token.text for token in tokens], attention)


def _run(lm: LanguageModel, ids: list[int], attention: bool) -> Any:
    """One forward pass; only eager attention gives its weights away."""
    before = lm.model.config._attn_implementation
    if attention:
        lm.model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            inputs = torch.tensor([ids], device=lm.model.device)
            return lm.model(input_ids=inputs, use_cache=False, output_attentions=attention)
    finally:
        if attention:
            lm.model.set_attn_implementation(before)


def _next(
    lm: LanguageModel, logits: torch.Tensor, options: InspectOptions
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The likeliest next tokens, alone and under each control and all of them together; logits: (1, vocabulary)."""
    asked = {name: value for name, value in set_fields(options).items() if name in _WARPERS}
    controls = asked or _SHOWN
    warped = {f"{name} {value:g}": _WARPERS[name](value)(None, logits.clone()) for name, value in controls.items()}
    if len(asked) > 1:
        together = logits.clone()
        for name, value in asked.items():
            together = _WARPERS[name](value)(None, together)
        warped["together"] = together
    plain = logits.softmax(-1)[0]
    under = {name: values.softmax(-1)[0] for name, values in warped.items()}
    likeliest = plain.topk(min(options.top, len(plain))).indices.tolist()
    rows = [
        {"text": readable(lm.tokenizer, one), "id": one, "probability": plain[one].item()}
        | {name: values[one].item() for name, values in under.items()}
        for one in likeliest
    ]
    return rows, {name: int(values.isfinite().sum()) for name, values in warped.items()}


def readable(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as a reader can read it: spaces and newlines as signs, a part of a character as its bytes."""
    word = tokenizer.convert_ids_to_tokens(token)
    if word is None:  # some models have more outputs than their tokenizer has tokens
        return f"⟨token {token}⟩"
    if token in tokenizer.all_special_ids:
        return word
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend and "ByteLevel" in str(backend.decoder) and all(sign in _BYTES for sign in word):
        raw = bytes(_BYTES[sign] for sign in word)
    elif byte := re.fullmatch("<0x([0-9A-F]{2})>", word):  # SentencePiece's
        raw = bytes.fromhex(byte[1])
    else:
        raw = word.replace("▁", " ").encode()
    try:
        return raw.decode().translate(_SIGNS)
    except UnicodeDecodeError:
        return "⟨" + raw.hex(" ") + "⟩"


def _view(inspection: Inspection) -> dict[str, Any]:
    """What a page shows of an inspection."""
    names = ["probability", *inspection.left]
    title = "".join(token.text for token in inspection.tokens).replace("·", " ").replace("↵", " ").strip()
    return {
        "model": inspection.model,
        "title": title if len(title) <= 60 else f"{title[:60]}…",
        "sentence": f"{inspection.bits:.1f} bits in {len(inspection.tokens)} tokens",
        "tokens": [
            {"text": token.text, "title": _told(token), "strength": _strength(token), "ends_line": "↵" in token.text}
            for token in inspection.tokens
        ],
        "head": ["next token", "alone", *(f"{name}: {count:,} left" for name, count in inspection.left.items())],
        "rows": [
            [{"text": row["text"]}, *({"text": cell(row[name]), "share": round(100 * row[name])} for name in names)]
            for row in inspection.following
        ],
    }


def to_page(inspection: Inspection, layer: int | None = None) -> str:
    """A page on its own, which fetches nothing. Its attention, if there is any, can be explored; of one layer, or all.

    Raises:
        HfkitError: the weights are more than a page can hold.
    """
    attention = None
    if inspection.attention is not None:
        layers = range(len(inspection.attention)) if layer is None else [layer]
        rows, columns = torch.tril_indices(len(inspection.words), len(inspection.words))
        weights = inspection.attention[list(layers)][..., rows, columns]
        if weights.numel() > _MOST_WEIGHTS:
            raise HfkitError(
                f"{len(inspection.words)} tokens have {weights.numel():,} attention weights, too many for a page: "
                "choose one --layer, or a shorter text"
            )
        attention = {
            "words": inspection.words,
            "layers": " ".join(map(str, layers)),
            "heads": weights.shape[1],
            "weights": base64.b64encode((255 * weights.sqrt()).round().to(torch.uint8).numpy().tobytes()).decode(),
        }
    return render("inspection.html.jinja", view=_view(inspection), is_page=True, attention=attention)
