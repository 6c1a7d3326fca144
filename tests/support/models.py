"""Models and files of models, made by hand."""

import json
from pathlib import Path

from safetensors.numpy import load_file, save_file


def write_gguf(model, tokenizer, path: Path, blocks: int | None = None) -> str:
    """What llama.cpp's converter would write. blocks: the number that the file gives, if it is not the right one."""
    import gguf

    config, architecture = model.config, model.config.model_type
    heads, kv = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    file = gguf.GGUFWriter(path, architecture)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(blocks or config.num_hidden_layers)
    file.add_feed_forward_length(getattr(config, "intermediate_size", 4 * config.hidden_size))
    file.add_head_count(heads)
    file.add_head_count_kv(kv)
    file.add_vocab_size(config.vocab_size)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(backend["vocab"], key=backend["vocab"].get)
    file.add_token_list(words)
    file.add_token_merges([" ".join(merge) for merge in backend["merges"]])
    if architecture == "gpt2":
        file.add_layer_norm_eps(config.layer_norm_epsilon)
        file.add_tokenizer_model("gpt2")
    else:
        file.add_layer_norm_rms_eps(config.rms_norm_eps)
        file.add_rope_dimension_count(config.hidden_size // heads)
        file.add_tokenizer_model("llama")
        file.add_token_scores([-float(i) for i in range(len(words))])
        file.add_token_types([2] + [3] * 2 + [6] * 256 + [1] * (len(words) - 259))
    file.add_bos_token_id(config.bos_token_id)
    file.add_eos_token_id(config.eos_token_id)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            array = array.T
        if "q_proj" in name or "k_proj" in name:
            count = heads if "q_proj" in name else kv
            array = array.reshape(count, 2, len(array) // count // 2, -1).swapaxes(1, 2).reshape(array.shape)
        file.add_tensor(names.get_name(name, (".weight", ".bias")), array.copy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return str(path)


def shard(folder) -> dict[str, str]:
    """Split a model's weights over two files; the index's weight_map."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, part in parts.items() for name in part}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder, weight_map) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def byte_vocabulary() -> dict[str, int]:
    """All 256 bytes and an end-of-text token, without a merge: every text can be encoded."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {symbol: i for i, symbol in enumerate([*bytes_to_unicode().values(), "<|endoftext|>"])}
