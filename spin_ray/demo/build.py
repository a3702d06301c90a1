"""Rebuild the embedded model and data: `python -m spin_ray.demo.build` (about an hour on two cores; a run never needs it).

Imitates the paper's setting in miniature:
1. data: `train.jsonl` (the small careful SFT set) and `heldout.jsonl`, messages format, each row with a checkable `answer`;
2. a byte-level BPE tokenizer with a chat template, trained on the same kind of text;
3. `base/`: a Llama of 0.9M parameters, pretrained on answers of which only 40 % are careful;
4. `sft/`: the base after one epoch of SFT on `train.jsonl`, made by `spin_ray sft`: the model that SPIN starts from.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spin_ray.demo import HERE
from spin_ray.demo.tasks import careless_answer, draw_task

NUM_TRAIN, NUM_HELDOUT, NUM_MORE = 800, 500, 2_400
CAREFUL_SHARE = 0.4
VOCAB_SIZE = 1024
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_data() -> None:
    """Write train.jsonl (NUM_TRAIN + NUM_MORE rows) and heldout.jsonl: distinct instructions, none in both."""
    rng, seen = Random(0), set()

    def rows(count: int) -> list[str]:
        found: list[str] = []
        while len(found) < count:
            task = draw_task(rng)
            if task.instruction not in seen:
                seen.add(task.instruction)
                turns = [{"role": "user", "content": task.instruction}, {"role": "assistant", "content": task.careful}]
                found.append(json.dumps({"messages": turns, "answer": task.careful}) + "\n")
        return found

    train, heldout = rows(NUM_TRAIN), rows(NUM_HELDOUT)
    (HERE / "train.jsonl").write_text("".join(train + rows(NUM_MORE)))
    (HERE / "heldout.jsonl").write_text("".join(heldout))


def corpus(seed: int) -> Iterator[tuple[str, str]]:
    """An endless stream of (instruction, answer), 40 % careful, without the held-out questions and the first of train.jsonl."""
    rng = Random(seed)
    lines = (HERE / "train.jsonl").read_text().splitlines()[:NUM_TRAIN] + (HERE / "heldout.jsonl").read_text().splitlines()
    kept_back = {json.loads(line)["messages"][0]["content"] for line in lines}
    while True:
        task = draw_task(rng)
        if task.instruction not in kept_back:
            careful = rng.random() < CAREFUL_SHARE
            yield task.instruction, task.careful if careful else careless_answer(task, rng)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer on 20,000 draws of the corpus."""
    stream = corpus(seed=1)
    texts = [text for _ in range(20_000) for text in next(stream)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>",
        additional_special_tokens=SPECIAL[2:], model_max_length=256, clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def pretraining_batches(tokenizer: PreTrainedTokenizerFast, num_steps: int, batch: int) -> Iterator[torch.Tensor]:
    """Right-padded ids [batch, longest], rows of similar length together."""
    stream, window = corpus(seed=2), 16
    for _ in range(math.ceil(num_steps / window)):
        turns = [next(stream) for _ in range(batch * window)]
        texts = [f"<|user|>{question}<|end|><|assistant|>{answer}<|end|>" for question, answer in turns]
        ids = sorted(tokenizer(texts, add_special_tokens=False)["input_ids"], key=len)
        order = list(range(window))
        Random(len(ids[-1])).shuffle(order)
        for k in order:
            rows = [torch.tensor(row) for row in ids[k * batch : (k + 1) * batch]]
            yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)


def build_base(tokenizer: PreTrainedTokenizerFast, num_steps: int, peak_lr: float = 2e-3, batch: int = 64) -> None:
    """Pretrain on the corpus's answers, warm-up then cosine."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.01, betas=(0.9, 0.98))
    print(f"base model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True)
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    start, losses = time.time(), []
    for step, ids in enumerate(pretraining_batches(tokenizer, num_steps, batch)):
        rate = peak_lr * min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / num_steps)) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Only answers are learned: the questions are random words, and a tiny model would spend itself on their noise.
        # No mask for the right padding: causal attention never looks that far.
        answering = (ids == assistant).cumsum(1) - (ids == assistant).long()
        labels = ids.masked_fill((answering == 0) | (ids == tokenizer.pad_token_id), -100)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 0:
            recent = sum(losses[-100:]) / len(losses[-100:])
            print(f"step {step}  loss {recent:.4f}  {time.time() - start:.0f} s", flush=True)
    save(model, tokenizer, HERE / "base")


def build_sft(tokenizer: PreTrainedTokenizerFast) -> None:
    """The model that SPIN starts from, by the project's own SFT."""
    conf = HERE.parents[1] / "conf" / "demo_sft.yaml"
    with tempfile.TemporaryDirectory() as runs:
        subprocess.run([sys.executable, "-m", "spin_ray", "sft", str(conf), f"run.dir={runs}"], check=True)
        save(LlamaForCausalLM.from_pretrained(f"{runs}/demo_sft/iter_000/model"), tokenizer, HERE / "sft")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save in bfloat16: half the size in the repository, exact in float32 when loaded."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8_000, help="pretraining steps of 64 questions and answers")
    args = parser.parse_args()
    build_data()
    tokenizer = build_tokenizer()
    build_base(tokenizer, num_steps=args.steps)
    build_sft(tokenizer)


if __name__ == "__main__":
    main()
