"""What a configuration says about a model."""

import pytest
import transformers

import hfkit
from hfkit.models.architecture import context_length


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (transformers.GPT2Config(n_positions=64), 64),
        (transformers.LlamaConfig(max_position_embeddings=77), 77),
        (transformers.MptConfig(max_seq_len=99), 99),
        (transformers.XLNetConfig(), None),
        (transformers.BloomConfig(), None),
        (transformers.MambaConfig(), None),
        (transformers.T5Config(), None),
        (transformers.RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (transformers.RobertaConfig(max_position_embeddings=514, pad_token_id=None), 513),
        (transformers.Gemma3Config(text_config={"max_position_embeddings": 55}), 55),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_context_length(config, length):
    """Most tokens that a model takes, wherever its configuration has them; None without a limit."""
    assert context_length(config) == length


@pytest.mark.parametrize("kind", ["mpt", "xlnet"])
def test_generate_to_the_end_of_the_context(kind, tiny, tmp_path):
    """MPT stops at its limit, XLNet has none."""
    shape = {"vocab_size": 257, "n_layers": 1, "n_layer": 1, "d_model": 32, "n_heads": 2, "n_head": 2, "d_inner": 32}
    config = transformers.AutoConfig.for_model(kind, max_seq_len=20, bos_token_id=256, eos_token_id=256, **shape)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    transformers.GPT2Tokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    options = {"model": str(tmp_path), "temperature": 0, "suppress_tokens": [256]}
    assert hfkit.generate("a" * 12, max_new_tokens=8, **options).tokens == 8
    if kind == "mpt":
        with pytest.raises(hfkit.HfkitError, match="takes 20 together"):
            hfkit.generate("a" * 12, max_new_tokens=9, **options)
    else:
        assert hfkit.generate("a" * 12, max_new_tokens=40, **options).tokens == 40
