"""Trains the bundled language model: a small GPT-2 on Python sources, on a CPU, without a network.

    python -m experiments.bundled_model.train --out runs/language_model            # about 1.5 hours on 2 cores, 52M tokens

Text: the standard library and every package installed beside this project; one file in twenty is held out by name
(`switch_sae.activations.text.is_held_out`). Every row starts with the beginning-of-sequence token, as transformer_lens will present it.
Killed? The same command goes on from the last saved step. Figures of the shipped model: switch_sae/bundled/README.md.
"""

import argparse
import hashlib
import json
import math
import os
import random
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from switch_sae.activations.text import Document, installed_packages, standard_library

BOS = "<|endoftext|>"


def corpus() -> tuple[list[Document], list[Document]]:
    """(train, held out), without exact copies; a copy of a held-out file is never trained on."""
    seen: set[bytes] = set()
    train, held_out = [], []
    for document in sorted([*standard_library(), *installed_packages()], key=lambda d: (not d.held_out, d.name)):
        digest = hashlib.sha256(document.text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            (held_out if document.held_out else train).append(document)
    return train, held_out


def build_tokenizer(train: list[Document], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text on any machine can be encoded; learned on the standard library and one package file in six."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    sample = (d.text for i, d in enumerate(train) if d.name.startswith("stdlib/") or i % 6 == 0)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(sample, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[BOS], initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=BOS, unk_token=BOS, pad_token=BOS, model_max_length=context)


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> np.ndarray:
    """All documents as one stream of token ids, each preceded by BOS."""
    parts = []
    for start in range(0, len(documents), 512):
        for encoding in tokenizer.backend_tokenizer.encode_batch([d.text for d in documents[start : start + 512]]):
            parts.append(np.array([tokenizer.bos_token_id, *encoding.ids], dtype=np.uint16))
    return np.concatenate(parts)


def rows(stream: np.ndarray, context: int, bos: int, order: np.ndarray) -> torch.Tensor:
    """Rows `order` of the stream cut into pieces of `context`: [BOS, piece] of length context + 1 (inputs and shifted targets)."""
    pieces = stream[: len(stream) // context * context].reshape(-1, context)[order].astype(np.int64)
    return torch.from_numpy(np.concatenate([np.full((len(pieces), 1), bos), pieces], axis=1))


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, batch: torch.Tensor) -> float:
    """Mean next-token cross-entropy, in nats."""
    total = 0.0
    for chunk in batch.split(32):
        total += F.cross_entropy(model(chunk[:, :-1]).logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum").item()
    return total / batch[:, 1:].numel()


def baselines(train: np.ndarray, held_out: np.ndarray, vocabulary: int) -> dict[str, float]:
    """Cross-entropies in nats of a unigram and of a bigram model, fitted on `train` with the interpolation weight that suits `held_out` best."""
    unigram = np.bincount(train, minlength=vocabulary) + 1.0
    unigram /= unigram.sum()
    pairs = np.bincount(train[:-1].astype(np.int64) * vocabulary + train[1:], minlength=vocabulary**2).reshape(vocabulary, vocabulary)
    bigram = pairs / np.maximum(pairs.sum(1, keepdims=True), 1)
    p_bi, p_uni = bigram[held_out[:-1], held_out[1:]], unigram[held_out[1:]]
    best = min(float(-np.log(w * p_bi + (1 - w) * p_uni).mean()) for w in np.linspace(0.5, 0.99, 50))
    return {"unigram": float(-np.log(unigram[held_out]).mean()), "bigram": best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=52e6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32, help="rows per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop-after", type=int, default=0, help="stop after so many steps, for trials")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    train_documents, held_out_documents = corpus()
    random.Random(args.seed).shuffle(train_documents)
    tokenizer_folder = args.out / "tokenizer"
    if not tokenizer_folder.exists():
        build_tokenizer(train_documents, args.vocabulary, args.context).save_pretrained(tokenizer_folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    bos = tokenizer.bos_token_id
    stream = encode(tokenizer, train_documents)
    held_out = encode(tokenizer, held_out_documents)
    held_out_bytes = sum(len(d.text.encode()) for d in held_out_documents)
    bytes_per_token = held_out_bytes / len(held_out)
    packages = Counter()
    for document in train_documents:
        packages["/".join(document.name.split("/")[: 1 if document.name.startswith("stdlib/") else 2])] += len(document.text)
    print(f"{len(train_documents)} documents, {sum(packages.values()) / 1e6:.0f} MB, {len(stream) / 1e6:.1f}M tokens", flush=True)
    print(f"held out {len(held_out_documents)} documents, {len(held_out) / 1e6:.2f}M tokens; {bytes_per_token:.2f} bytes per token", flush=True)
    base = baselines(stream, held_out, args.vocabulary)
    print(f"baselines in nats: {base}", flush=True)

    config = GPT2Config(
        vocab_size=args.vocabulary, n_positions=args.context, n_embd=args.width, n_layer=args.depth, n_head=args.heads, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=bos, eos_token_id=bos, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    rest = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".h." in name)]
    if args.optimizer == "muon":
        optimizers = [torch.optim.Muon(hidden, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")]
    else:
        optimizers = [torch.optim.AdamW(hidden, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)]
    optimizers.append(torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True))

    per_step = args.batch * args.context
    steps = math.ceil(args.tokens / per_step)
    pieces = len(stream) // args.context
    epochs = math.ceil(steps * args.batch / pieces)
    order = np.concatenate([np.random.default_rng((args.seed, epoch)).permutation(pieces) for epoch in range(epochs)])
    check = rows(held_out, args.context, bos, np.random.default_rng(1).permutation(len(held_out) // args.context)[:256])

    state_file, step, log = args.out / "state.pt", 0, []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, log = state["step"], state["log"]
        print(f"goes on from step {step}", flush=True)

    @torch.compile
    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())

    def save() -> None:
        part = state_file.with_suffix(".part")
        torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step, "log": log}, part)
        part.replace(state_file)

    started, first = time.time(), step
    while step < min(steps, args.stop_after or steps):
        fraction = step / steps
        lr = args.lr * min(1.0, (step + 1) / 200) * min(1.0, (1 - fraction) / 0.3)  # warm-up, plateau, linear decay over the last 30 %
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        loss = loss_of(rows(stream, args.context, bos, order[step * args.batch : (step + 1) * args.batch]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 250 == 0 or step == steps:
            nats = held_out_loss(model, check)
            log.append({"step": step, "tokens": step * per_step, "train": round(loss.item(), 4), "held_out": round(nats, 4)})
            print(log[-1], f"{(step - first) * per_step / (time.time() - started):.0f} tokens/s", flush=True)
            save()
    model.eval()
    scored = rows(held_out, args.context, bos, np.random.default_rng(2).permutation(len(held_out) // args.context)[:8000])
    nats = held_out_loss(model, scored)
    stdlib = encode(tokenizer, [d for d in held_out_documents if d.name.startswith("stdlib/")])
    stdlib_nats = held_out_loss(model, rows(stdlib, args.context, bos, np.arange(len(stdlib) // args.context)))
    bits = {name: value / math.log(2) / bytes_per_token for name, value in {**base, "model": nats}.items()}
    samples = {}
    for prompt in ("def __init__(self, ", "import os\n", "class "):
        ids = torch.tensor([[bos, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
        torch.manual_seed(args.seed)
        samples[prompt] = tokenizer.decode(model.generate(ids, max_new_tokens=60, do_sample=True, temperature=0.8, top_k=40, pad_token_id=bos)[0, 1:])
    model.to(torch.bfloat16).save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    record = {
        "command": "python -m experiments.bundled_model.train", "arguments": {k: str(v) for k, v in vars(args).items() if k != "out"},
        "parameters": sum(p.numel() for p in model.parameters()), "tokens_seen": step * per_step, "training_stream_tokens": len(stream),
        "held_out_tokens_scored": scored[:, 1:].numel(), "bytes_per_token": bytes_per_token,
        "held_out_nats": nats, "held_out_nats_standard_library": stdlib_nats,
        "held_out_bits_per_byte": bits, "samples": samples, "characters_by_package": dict(packages.most_common()), "log": log,
    }  # fmt: skip
    (args.out / "model" / "training.json").write_text(json.dumps(record, indent=1))
    print(json.dumps({k: record[k] for k in ("parameters", "tokens_seen", "held_out_nats", "held_out_bits_per_byte", "samples")}, indent=1))


if __name__ == "__main__":
    main()
