"""Write small checkpoints with TensorFlow, and what TensorFlow computes with them: `python write_checkpoints.py DIR`.

The two graphs are those of openai/gpt-2 (src/model.py) and google-research/bert (modeling.py, run_pretraining.py),
written anew with the operations that TensorFlow 2 still has; no part of them knows hfkit or transformers.
Both files themselves, run with TensorFlow 2.21, restore these checkpoints and compute the same to 2e-6.
With transformers 4 (and tf-keras) it writes tf_model.h5 folders as well.

The files beside this script were written with tensorflow-cpu 2.21, transformers 4.46 and tf-keras 2.21.
"""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

os.environ |= {"TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

tf1 = tf.compat.v1
IDS = np.array([[40, 3, 17, 99, 257, 5, 5, 61, 130, 2]])
MASK, SEGMENTS = np.array([[1] * 8 + [0] * 2]), np.array([[0] * 5 + [1] * 5])
WORDS = "the a cat dog bird sat ran sang on in under mat tree house old red and good bad day was is".split()


def variable(name: str, *shape: int, mean: float = 0.0):
    """A weight that is nowhere near what a new model has: a bias or scale in the wrong place shows."""
    return tf1.get_variable(name, shape, initializer=tf1.random_normal_initializer(mean, 0.3))


def gelu(x):
    return 0.5 * x * (1 + tf.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * tf.pow(x, 3))))


def normalize(x, scope: str, scale: str, shift: str, epsilon: float):
    with tf1.variable_scope(scope):
        mean, variance = tf.nn.moments(x, -1, keepdims=True)
        width = x.shape[-1]
        return (x - mean) * tf1.rsqrt(variance + epsilon) * variable(scale, width, mean=1.0) + variable(shift, width)


def attend(query, key, value, heads: int, penalty):
    """Attention of (length, width) tensors. penalty: (length, length), what is added to the scores."""

    def split(x):
        return tf.transpose(tf.reshape(x, [x.shape[0], heads, -1]), [1, 0, 2])

    scores = tf.matmul(split(query), split(key), transpose_b=True) / np.sqrt(int(query.shape[-1]) // heads)
    mixed = tf.matmul(tf.nn.softmax(scores + penalty), split(value))
    return tf.reshape(tf.transpose(mixed, [1, 0, 2]), query.shape)


# openai/gpt-2


def conv1d(x, scope: str, size: int):
    with tf1.variable_scope(scope):
        w, b = variable("w", 1, x.shape[-1], size), variable("b", size)
        return tf.matmul(x, tf.reshape(w, [-1, size])) + b


def gpt2(hparams: dict[str, int]):
    """The logits of IDS[0]."""
    ids, width = IDS[0], hparams["n_embd"]
    with tf1.variable_scope("model"):
        wpe, wte = variable("wpe", hparams["n_ctx"], width), variable("wte", hparams["n_vocab"], width)
        x = tf.gather(wte, ids) + wpe[: len(ids)]
        penalty = -1e10 * (1 - np.tri(len(ids), dtype=np.float32))
        for layer in range(hparams["n_layer"]):
            with tf1.variable_scope(f"h{layer}"):
                before = normalize(x, "ln_1", "g", "b", 1e-5)
                query, key, value = tf.split(conv1d(before, "attn/c_attn", 3 * width), 3, -1)
                x += conv1d(attend(query, key, value, hparams["n_head"], penalty), "attn/c_proj", width)
                inner = conv1d(normalize(x, "ln_2", "g", "b", 1e-5), "mlp/c_fc", 4 * width)
                x += conv1d(gelu(inner), "mlp/c_proj", width)
        return {"logits": tf.matmul(normalize(x, "ln_f", "g", "b", 1e-5), wte, transpose_b=True)}


# google-research/bert


def dense(x, scope: str, size: int):
    with tf1.variable_scope(scope):
        return tf.matmul(x, variable("kernel", x.shape[-1], size)) + variable("bias", size)


def linear(x, scope: str, size: int):
    """A head as the repository writes it: its weights are (size, width)."""
    with tf1.variable_scope(scope, auxiliary_name_scope=False) if scope else nullcontext():
        weights, bias = variable("output_weights", size, x.shape[-1]), variable("output_bias", size)
    return tf.matmul(x, weights, transpose_b=True) + bias


def bert(config: dict[str, int], head: str):
    """The logits of a head for IDS[0], of which the end is padding. head: pretraining, classifier or squad."""
    ids, width = IDS[0] % config["vocab_size"], config["hidden_size"]
    penalty = -10000.0 * (1 - MASK.astype(np.float32))
    with tf1.variable_scope("bert"):
        with tf1.variable_scope("embeddings"):
            words = variable("word_embeddings", config["vocab_size"], width)
            segments = variable("token_type_embeddings", config["type_vocab_size"], width)
            positions = variable("position_embeddings", config["max_position_embeddings"], width)
            x = tf.gather(words, ids) + tf.gather(segments, SEGMENTS[0]) + positions[: len(ids)]
            x = normalize(x, "LayerNorm", "gamma", "beta", 1e-12)
        for layer in range(config["num_hidden_layers"]):
            with tf1.variable_scope(f"encoder/layer_{layer}"):
                parts = (dense(x, f"attention/self/{part}", width) for part in ("query", "key", "value"))
                mixed = attend(*parts, config["num_attention_heads"], penalty)
                x += dense(mixed, "attention/output/dense", width)
                x = normalize(x, "attention/output/LayerNorm", "gamma", "beta", 1e-12)
                inner = gelu(dense(x, "intermediate/dense", config["intermediate_size"]))
                x = normalize(x + dense(inner, "output/dense", width), "output/LayerNorm", "gamma", "beta", 1e-12)
        pooled = tf.tanh(dense(x[:1], "pooler/dense", width))
    if head == "classifier":  # run_classifier.py
        return {"logits": linear(pooled, "", 3)}
    if head == "squad":  # run_squad.py
        start, end = tf.unstack(linear(x, "cls/squad", 2), axis=-1)
        return {"start_logits": start, "end_logits": end}
    with tf1.variable_scope("cls/predictions"):
        hidden = normalize(gelu(dense(x, "transform/dense", width)), "transform/LayerNorm", "gamma", "beta", 1e-12)
        masked = tf.matmul(hidden, words, transpose_b=True) + variable("output_bias", config["vocab_size"])
    return {"prediction_logits": masked, "seq_relationship_logits": linear(pooled, "cls/seq_relationship", 2)}


def save(folder: Path, make, name: str, step: int | None = None, slots: bool = False) -> None:
    """Write the variables of a graph as a Saver of TensorFlow 1 does, and what the graph computes.

    slots: write what an optimizer keeps beside the weights, too.
    """
    with tf.Graph().as_default(), tf1.Session() as session:
        tf1.set_random_seed(11)
        results = make()
        if slots:
            tf1.get_variable("global_step", initializer=np.int64(7))
            for weight in tf1.trainable_variables()[:3]:
                tf1.get_variable(f"{weight.op.name}/adam_m", initializer=tf.zeros(weight.shape))
        session.run(tf1.global_variables_initializer())
        tf1.train.Saver().save(session, str(folder / name), global_step=step, write_meta_graph=False)
        np.savez(folder / "expected.npz", **session.run(results))


def write_gpt2(folder: Path, width: int) -> None:
    folder.mkdir(parents=True)
    letters = [chr(i) for i in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    symbols = [*letters, *(chr(256 + i) for i in range(256 - len(letters)))]
    words = [*symbols, "th", "Ġt", "the", "<|endoftext|>"]
    hparams = {"n_vocab": len(words), "n_ctx": 64, "n_embd": width, "n_head": 2, "n_layer": 2}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    (folder / "encoder.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\nt h\nĠ t\nth e\n", "utf-8")
    save(folder, lambda: gpt2(hparams), "model", step=20)


def write_bert(folder: Path, width: int, head: str = "pretraining", name: str = "bert_model.ckpt") -> None:
    folder.mkdir(parents=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *WORDS]
    words = list(dict.fromkeys([*words, *".,!?"]))
    config = {
        "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": width,
        "intermediate_size": 2 * width, "max_position_embeddings": 64, "num_attention_heads": 2,
        "num_hidden_layers": 2, "type_vocab_size": 2, "vocab_size": len(words), "directionality": "bidi",
    }  # fmt: skip
    (folder / "bert_config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    save(folder, lambda: bert(config, head), name, slots=head == "pretraining")
    (folder / "checkpoint").unlink()  # Google's folders have none


def write_h5(folder: Path, model) -> None:
    """What `save_pretrained` of a TensorFlow class of transformers 4 writes, with weights as in `variable`."""
    call = {"attention_mask": MASK, "token_type_ids": SEGMENTS} if model.config.model_type == "bert" else {}
    ids = IDS % model.config.vocab_size
    model(ids, **call)
    random = np.random.default_rng(12)
    for weight in model.weights:
        weight.assign_add(random.normal(0, 0.3, weight.shape))
    results = model(ids, **call)
    model.save_pretrained(folder)
    np.savez(
        folder / "expected.npz", **{name: value.numpy()[0] for name, value in results.items() if "logits" in name}
    )


def write_all(folder: Path, width: int) -> None:
    write_gpt2(folder / "gpt2", width)
    write_bert(folder / "bert", width)
    write_bert(folder / "bert-classifier", width, "classifier", "model.ckpt-9")
    write_bert(folder / "bert-squad", width, "squad", "model.ckpt-9")
    try:
        from transformers import BertConfig, GPT2Config, TFBertForPreTraining, TFGPT2LMHeadModel
    except (ImportError, RuntimeError):
        print("no transformers 4 with tf-keras: no tf_model.h5", file=sys.stderr)
        return
    hparams = json.loads((folder / "gpt2" / "hparams.json").read_text())
    sizes = {"vocab_size": hparams["n_vocab"], "n_positions": hparams["n_ctx"], "n_embd": width}
    end = hparams["n_vocab"] - 1
    config = GPT2Config(**sizes, n_layer=2, n_head=2, bos_token_id=end, eos_token_id=end)
    write_h5(folder / "gpt2-h5", TFGPT2LMHeadModel(config))
    write_h5(folder / "bert-h5", TFBertForPreTraining(BertConfig.from_json_file(folder / "bert" / "bert_config.json")))
    for target, source, names in (("gpt2-h5", "gpt2", {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}),
                                  ("bert-h5", "bert", {"vocab.txt": "vocab.txt"})):  # fmt: skip
        for old, new in names.items():
            (folder / target / new).write_bytes((folder / source / old).read_bytes())


if __name__ == "__main__":
    write_all(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 8)
