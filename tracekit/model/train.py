"""Train the reference model: a small ``hy_v3`` language model with one NextN block, on the standard library's sources.

Run ``python -m tracekit.model.train -o reference.gguf`` (needs the ``train`` extra). Two phases, both
with fixed seeds and fixed step counts:

1. *joint*: next-token loss of the trunk plus ``0.3 *`` the NextN block's loss at depth 1
   (DeepSeek-V3, arXiv 2412.19437, section 2.2), which makes the trunk's hidden state worth drafting from;
2. *head*: the trunk is frozen and the NextN block alone learns the trunk's own distribution, unrolled over
   its own hidden states to depth 5, attending exactly as it will when it drafts: over rows made from the
   target's hidden states up to the last verified token, and over its own rows after that ("training-time
   test", EAGLE-3, arXiv 2503.01840).

A larger one takes ``--n-embd``, ``--n-layer`` and their like, more text (``--text FOLDER``, any Python sources), and a
GPU; ``tracekit model build --source`` expands it further.

Matrices are optimised by Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/), the rest by AdamW.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tracekit.model import corpus, weights
from tracekit.model.net import Model, Shape, rotary

END_OF_TEXT = "<|endoftext|>"
KIND_WEIGHT = {"code": 1, "prose": 2, "literate": 2, "repeat": 1}


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by a Newton-Schulz iteration (coefficients: Keller Jordan)."""

    def __init__(self, params, lr: float, bf16: bool, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.bf16 = bf16

    @torch.no_grad()
    def step(self):
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                x = update.T if p.shape[0] > p.shape[1] else update
                x = (x / (x.norm() + 1e-7)).bfloat16() if self.bf16 else x / (x.norm() + 1e-7)
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = x.T if p.shape[0] > p.shape[1] else x
                p.mul_(1 - group["lr"] * 0.05)
                p.add_(x.float(), alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def tokenizer_of(texts: list[str], n_vocab: int):
    """A byte-level BPE of ``n_vocab`` tokens with GPT-2's pre-tokeniser; token 0 is the end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Stream:
    """Endless batches ``[batch, n_ctx_train + 1]``: documents shuffled, joined by the end of text, cut into rows."""

    def __init__(self, documents: list[list[int]], length: int, batch: int, seed: int):
        self.documents = [torch.tensor([0, *document]) for document in documents]
        self.length, self.batch, self.rng = length, batch, random.Random(seed)
        self.tokens = torch.tensor([], dtype=torch.long)

    def __next__(self) -> Tensor:
        used = self.batch * self.length
        while len(self.tokens) < used + 1:
            order = list(range(len(self.documents)))
            self.rng.shuffle(order)
            self.tokens = torch.cat([self.tokens, *(self.documents[i] for i in order)])
        rows = self.tokens[: used + 1].unfold(0, self.length + 1, self.length)
        self.tokens = self.tokens[used:]
        return rows


def optimizers(
    model: Model, names: list[str], muon_lr: float, adam_lr: float, bf16: bool
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices among the parameters ``names``, AdamW for the rest."""
    chosen = {n: p for n, p in model.named_parameters() if n in names}
    matrices = [p for n, p in chosen.items() if p.ndim == 2 and n != "token_embd"]
    rest = [p for n, p in chosen.items() if p.ndim != 2 or n == "token_embd"]
    return [Muon(matrices, muon_lr, bf16), torch.optim.AdamW(rest, adam_lr, betas=(0.9, 0.95), weight_decay=0.0)]


def schedule(step: int, steps: int) -> float:
    """Warm-up over 2 % of the steps, then a linear fall to zero over the last 60 %."""
    return min(1.0, (step + 1) / max(1, 0.02 * steps), (steps - step) / (0.6 * steps))


def train_phase(name, model, loss_of, names, stream, steps, muon_lr, adam_lr, device, bf16) -> list[tuple[int, float]]:
    """Run ``steps`` optimisation steps of ``loss_of(batch) -> (loss, dict of figures)``; prints and returns the
    curve.
    """
    opts = optimizers(model, names, muon_lr, adam_lr, bf16)
    base = [[g["lr"] for g in o.param_groups] for o in opts]
    started, curve, recent = time.monotonic(), [], []
    for step in range(steps):
        factor = schedule(step, steps)
        for o, rates in zip(opts, base, strict=True):
            for g, lr in zip(o.param_groups, rates, strict=True):
                g["lr"] = lr * factor
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            loss, figures = loss_of(next(stream).to(device))
        loss.backward()
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        recent.append(figures)
        if (step + 1) % 25 == 0 or step + 1 == steps:
            mean = {k: sum(f[k] for f in recent) / len(recent) for k in recent[0]}
            recent.clear()
            elapsed = time.monotonic() - started
            left = elapsed / (step + 1) * (steps - step - 1)
            curve.append((step + 1, mean[next(iter(mean))]))
            text = "  ".join(f"{k} {v:.3f}" for k, v in mean.items())
            print(f"{name} {step + 1:5d}/{steps}  {text}  {elapsed:6.0f} s, {left:5.0f} s left", flush=True)
    return curve


@torch.no_grad()
def agreement(model: Model, tokens: Tensor, rope, depth: int = 5) -> list[float]:
    """Share of positions where the first 1, 2, ... ``depth`` drafts all equal the target's arg-max (teacher-forced)."""
    hidden = model.hidden(tokens, rope)
    chosen = model.logits(hidden).argmax(-1)
    drafts = [model.logits(h).argmax(-1) for h in model.draft_hidden(tokens, hidden, depth, rope)]
    t, out = tokens.shape[1], []
    alive = torch.ones(tokens.shape[0], t - depth - 2, dtype=torch.bool, device=tokens.device)
    for d in range(depth):
        rows = slice(2 + d, t - depth + d)
        alive = alive & (drafts[d][:, rows] == chosen[:, rows])
        out.append(alive.float().mean().item())
    return out


def main() -> None:
    """Train, evaluate on the held-out documents, write the GGUF file."""
    parser = argparse.ArgumentParser(description="train tracekit's reference model")
    parser.add_argument("-o", "--out", default="reference.gguf")
    parser.add_argument("--steps-joint", type=int, default=1800)
    parser.add_argument("--steps-head", type=int, default=400)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--batch", type=int, default=8, help="rows of 512 tokens per step")
    parser.add_argument("--n-embd", type=int, default=Shape.n_embd, help="channels, a multiple of 128")
    parser.add_argument("--n-layer", type=int, default=Shape.n_layer, help="blocks of the trunk")
    parser.add_argument("--n-ff", type=int, help="width of the feed-forward [default: three times the channels]")
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FOLDER", help="more Python sources")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--float32", action="store_true", help="no bfloat16 autocast (slower where the processor has bf16)"
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    n_head = args.n_embd // Shape.n_embd_head
    if args.n_embd <= 0 or args.n_embd % (2 * Shape.n_embd_head):
        parser.error(f"--n-embd {args.n_embd}: a multiple of {2 * Shape.n_embd_head}")
    for folder in args.text:
        if not folder.is_dir():
            parser.error(f"--text {folder}: no such folder")
    shape = Shape(
        n_embd=args.n_embd,
        n_layer=args.n_layer,
        n_head=n_head,
        n_head_kv=n_head // 2,
        n_ff=args.n_ff or 3 * args.n_embd,
    )
    bf16, device = not args.float32, args.device

    documents = corpus.documents(*args.text)
    training = [d for d in documents if not d.held_out]
    tokenizer = tokenizer_of([d.text for d in training], shape.n_vocab)
    tokens = tokenizer.encode_batch([d.text for d in training])
    encoded = [t.ids for d, t in zip(training, tokens, strict=True) for _ in range(KIND_WEIGHT[d.kind])]
    n_tokens = sum(map(len, encoded))
    print(
        f"{len(training)} training documents, {sum(len(d.text) for d in training)} characters, {n_tokens} "
        "tokens per epoch"
    )

    model = Model(shape).to(device)
    rope = tuple(x.to(device) for x in rotary(shape, shape.n_ctx_train))
    print(f"{sum(p.numel() for p in model.parameters())} parameters on {device}{', bfloat16 autocast' if bf16 else ''}")
    stream = Stream(encoded, shape.n_ctx_train, args.batch, args.seed)

    def joint_loss(rows: Tensor):
        tokens, following = rows[:, :-1], rows[:, 1:]
        hidden = model.hidden(tokens, rope)
        main_loss = F.cross_entropy(model.logits(hidden).float().flatten(0, 1), following.flatten())
        loss, figures = main_loss, {"loss": main_loss.item()}
        for d, h in enumerate(model.draft_hidden(tokens, hidden, 1, rope)):
            depth_loss = F.cross_entropy(
                model.logits(h[:, d + 1 :]).float().flatten(0, 1), following[:, d + 1 :].flatten()
            )
            loss = loss + 0.3 * depth_loss
            figures[f"depth{d + 1}"] = depth_loss.item()
        return loss, figures

    def head_loss(rows: Tensor):
        tokens = rows[:, :-1]
        with torch.no_grad():
            hidden = model.hidden(tokens, rope)
            wanted = model.logits(hidden).float().softmax(-1)
        loss, figures = 0.0, {}
        for d, h in enumerate(model.draft_hidden(tokens, hidden, 5, rope)):
            log_p = model.logits(h[:, d + 1 :]).float().log_softmax(-1)
            depth_loss = -(wanted[:, d + 1 :] * log_p).sum(-1).mean()
            loss = loss + 0.8**d * depth_loss
            figures[f"depth{d + 1}"] = depth_loss.item()
        return loss, figures

    names = [n for n, _ in model.named_parameters()]
    head = [n for n in names if n.startswith(("nextn.", "eh_proj", "enorm", "hnorm", "shared_head_norm"))]
    curve = train_phase("joint", model, joint_loss, names, stream, args.steps_joint, args.muon_lr, 3e-3, device, bf16)
    for n, p in model.named_parameters():
        p.requires_grad_(n in head)
    curve += train_phase("head ", model, head_loss, head, stream, args.steps_head, 0.01, 1e-3, device, bf16)

    figures = {}
    for kind in KIND_WEIGHT:
        ids = [i for d in documents if d.held_out and d.kind == kind for i in [0, *tokenizer.encode(d.text).ids]]
        rows = min(24, len(ids) // shape.n_ctx_train)
        tokens = torch.tensor(ids[: rows * shape.n_ctx_train]).view(rows, -1).to(device)
        with torch.no_grad():
            loss = F.cross_entropy(
                model.logits(model.hidden(tokens, rope))[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
            ).item()
        accept = agreement(model, tokens, rope)
        figures[kind] = {
            "loss": round(loss, 4),
            "tokens": tokens.numel(),
            "accepted_to_depth": [round(a, 4) for a in accept],
        }
        print(
            f"held out {kind:8s} loss {loss:.3f}, drafts 1..5 all right: "
            f"{' '.join(f'{a:.3f}' for a in accept)} (n = {tokens.numel()} tokens)"
        )

    notes = {
        "source": f"standard library of Python {platform.python_version()}"
        f"{''.join(f', {folder.name}' for folder in args.text)}, {len(training)} training "
        f"documents, sha256 {corpus.digest(training)}",
        "training": f"seed {args.seed}, {args.steps_joint} + {args.steps_head} steps of {args.batch} x "
        f"{shape.n_ctx_train} tokens, torch {torch.__version__}, {device}",
        "loss": " ".join(f"{step}:{value:.3f}" for step, value in curve),
        "held_out": json.dumps(figures),
    }
    path = weights.write(to_weights(model, tokenizer, notes), Path(args.out))
    print(f"Wrote {path}")


def to_weights(model: Model, tokenizer, notes: dict[str, str]) -> weights.Weights:
    """The trained model under llama.cpp's tensor names."""
    s, tensors = model.s, {}
    for name, p in model.named_parameters():
        if name.startswith("nextn."):
            name = f"blk.{s.n_layer}.{name.removeprefix('nextn.')}"
        elif name in ("enorm", "hnorm", "shared_head_norm") or name.startswith("eh_proj"):
            name = f"blk.{s.n_layer}.nextn.{name}"
        tensors[name.removesuffix(".weight") + ".weight"] = weights.Tensor.of(p.detach().float().cpu().numpy())
    vocabulary, merges = tokenizer.get_vocab(), json.loads(tokenizer.to_str())["model"]["merges"]
    return weights.Weights(
        n_layer=s.n_layer, n_layer_nextn=1, n_embd=s.n_embd, n_ff=s.n_ff, n_head=s.n_head, n_head_kv=s.n_head_kv,
        n_embd_head=s.n_embd_head, n_ctx_train=s.n_ctx_train,
        rope_freq_base=s.rope_freq_base, norm_rms_eps=s.norm_rms_eps,
        tokens=tuple(sorted(vocabulary, key=vocabulary.__getitem__)),
        merges=tuple(m if isinstance(m, str) else " ".join(m) for m in merges),
        notes=notes, tensors=tensors,
    )  # fmt: skip  # one line per group of sizes


if __name__ == "__main__":
    main()
