"""A Qwen3 with random weights and a real byte-level tokenizer, saved as transformers saves models."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

CORPUS = [
    "a handwritten zero", "a handwritten one", "a handwritten two", "a corgi in the snow", "an orange cat",
    "a red panda climbing a bamboo stalk", "seven", "a photo of the number nine, drawn with a pencil",
]  # fmt: skip


def save_qwen3(folder: Path, width: int = 32, layers: int = 2, seed: int = 0) -> Path:
    """Save a model and its tokenizer, and return the folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[1])
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=width // 2,
        max_position_embeddings=512,
    )
    Qwen3Model(config).to(torch.float32).save_pretrained(folder, safe_serialization=True)
    return folder
