# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Anatomy of a packed mixture of experts
#
# The model that ships with the package is small enough to take apart on any machine: 13 million parameters, six layers,
# sixteen experts in each, weights packed to 4 bits by GPTQ. It was trained on fairy tales and writes more of them.
# Everything below is a pure function over a pytree. There are no hooks.
#
# Needs `pip install "ferrum-jax[notebook]"`. Run it here, or as a script: `python notebooks/anatomy.py`.
# With `FIGURES=folder` the pictures are also saved there.

# %%
import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np

import ferrum_jax as fj
from ferrum_kernels.bits import unpack

print("device:", jax.devices()[0])
for package in (fj, jax, np, matplotlib):
    print(package.__name__, package.__version__)


def keep(figure, name):
    if "FIGURES" in os.environ:
        figure.savefig(Path(os.environ["FIGURES"], name), dpi=150)


# %% [markdown]
# ## The model is a dictionary
#
# Consecutive layers of one structure are stacked, so the first axis of every leaf under `layers` is the layer.
# `uint32` leaves are packed words; experts have a second axis for the expert.

# %%
model = fj.load("demo", dtype="float32", quiet=True)  # nothing rounded: a small change has a small effect
cfg, params, tokenizer = model.cfg, model.params, model.tokenizer
L, E, K = cfg.num_layers, cfg.num_experts, cfg.top_k

for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    print(f"{jax.tree_util.keystr(path):58} {leaf.dtype.name:8} {list(leaf.shape)}")

# %% [markdown]
# ## One expert: words, integers, floats
#
# `down` of expert 3 in layer 0 is a `[128, 256]` matrix. Eight 4-bit codes lie in each word, down the input axis.
# A weight is `scale * (code - 8)`, with one scale per column and group of inputs; here one group holds all 128.

# %%
expert = fj.layer(params, 0)["moe"]["experts"]["down"][3]
codes = np.asarray(unpack(expert.qweight, expert.bits, expert.k, axis=0))
by_hand = np.asarray(expert.scales, np.float32) * (codes.astype(np.float32) - 8)
weights = np.asarray(fj.dequantize(expert, dtype=jnp.float32))

print("word 0 of column 0:", f"{int(expert.qweight[0, 0]):08x}", "(the first code is the last digit)")
print("its codes:         ", codes[:8, 0])
print("its weights:       ", by_hand[:8, 0].round(4))
print("same as fj.dequantize:", np.array_equal(by_hand, weights))
print(f"{expert.nbytes} bytes packed, {weights.nbytes} in float32")

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4), width_ratios=(1, 1, 0.9), layout="constrained")
image = left.imshow(codes[:48, :64], cmap="RdBu", vmin=0, vmax=16)
left.set(title="codes (top left corner)", xlabel="output", ylabel="input")
figure.colorbar(image, ax=left, shrink=0.75, ticks=[0, 4, 8, 12, 15])
limit = np.abs(weights).max()
image = middle.imshow(weights[:48, :64], cmap="RdBu", vmin=-limit, vmax=limit)
middle.set(title="weights", xlabel="output", ylabel="input")
figure.colorbar(image, ax=middle, shrink=0.75)
right.bar(np.arange(16), np.bincount(codes.ravel(), minlength=16) / codes.size, color="tab:blue")
right.set(title="how often each code occurs", xlabel="code", ylabel="share of weights", xticks=range(0, 16, 2))
keep(figure, "expert.png")

# %% [markdown]
# ## Where do tokens go?
#
# `forward(..., with_aux=True)` also returns what every router decided. The share of a text's tokens that each expert
# reads would be K / E = 25 % everywhere if the routers did not care. They do, and not alike for different texts.

# %%
TEXTS = {
    "a tale": "Once upon a time there was a poor woodcutter who lived with his wife and his two children at the edge "
    "of a great forest. One day the king's son came riding by and asked for a cup of water. The girl ran to the well.",
    "talk": '"Who are you?" said the wolf. "I am only a little girl," said she, "and I am going to my grandmother." '
    '"Where does your grandmother live?" said the wolf. "Oh, far away, behind the mill," said the little girl.',
    "names and numbers": "In 1812 Jacob and Wilhelm Grimm, of Kassel, printed 86 tales; in 1857 there were 210. "
    "Hans Christian Andersen, of Odense, wrote 156. Charles Perrault, of Paris, published 8 in 1697.",
}
forward = jax.jit(fj.forward, static_argnames=("cfg", "with_aux"))
encoded = [tokenizer.encode(text) for text in TEXTS.values()]
length = min(map(len, encoded))
tokens = np.asarray([ids[:length] for ids in encoded], np.int32)  # [3, T]
_, aux = forward(params, tokens, cfg=cfg, with_aux=True)
chosen = np.asarray(aux.routing[0].experts)  # [L, 3, T, K], best first
share = (chosen[..., None] == np.arange(E)).any(-2).mean(2)  # [L, 3, E]


def grid(axis, values, **options):
    axis.set(xlabel="expert", xticks=range(0, E, 3), yticks=range(L))
    return axis.imshow(values, aspect="auto", **options)


figure, axes = plt.subplots(1, len(TEXTS), figsize=(12, 3), sharey=True, layout="constrained")
for i, (axis, name) in enumerate(zip(axes, TEXTS, strict=True)):
    image = grid(axis, 100 * share[:, i], cmap="magma", vmin=0, vmax=100 * share.max())
    axis.set_title(f"{name} ({length} tokens)")
axes[0].set_ylabel("layer")
figure.colorbar(image, ax=axes, label="% of tokens", pad=0.01)
keep(figure, "routing.png")

# %% [markdown]
# Which experts answer to the kind of text? Those whose share differs most between the talk and the tale, with the
# tokens of the talk for which they are the first choice.

# %%
difference = share[:, 1] - share[:, 0]
for flat in np.argsort(-difference.ravel())[:4]:
    layer, number = divmod(int(flat), E)
    first = dict.fromkeys(tokenizer.decode([int(token)]) for token in tokens[1][chosen[layer, 1, :, 0] == number])
    tale, talk = share[layer, :2, number]
    print(f"layer {layer} expert {number:2}: {tale:4.0%} of the tale, {talk:4.0%} of the talk, first for {list(first)}")

# %% [markdown]
# ## Take an expert away
#
# An edit is a new tree: `fj.layer` gives one layer, `fj.set_layer` puts a changed one back, and the model it came from
# stays as it is. With zero scales, every weight of an expert's `down` is zero and the expert says nothing.


# %%
def without(layer_params, number):
    experts = layer_params["moe"]["experts"]
    silent = dataclasses.replace(experts["down"], scales=experts["down"].scales.at[number].set(0))
    return {**layer_params, "moe": {**layer_params["moe"], "experts": {**experts, "down": silent}}}


@jax.jit
def tale_loss(params):
    ids = tokens[0]
    logprobs = jax.nn.log_softmax(fj.forward(params, ids[None], cfg)[0, :-1])
    return -jnp.take_along_axis(logprobs, ids[1:, None], axis=-1).mean()


intact = float(tale_loss(params))
harm = np.zeros((L, E))
for layer in range(L):
    one = fj.layer(params, layer)
    for number in range(E):
        harm[layer, number] = float(tale_loss(fj.set_layer(params, layer, without(one, number)))) - intact

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.4), width_ratios=(1.5, 1), layout="constrained")
limit = np.abs(harm).max()
image = grid(left, harm, cmap="RdBu_r", vmin=-limit, vmax=limit)
left.set(title=f"loss on the tale without one expert, minus {intact:.2f}", ylabel="layer")
figure.colorbar(image, ax=left, label="nats per token", pad=0.01)
use = 100 * share[:, 0]
points = right.scatter(use, harm, c=np.repeat(np.arange(L), E), cmap="viridis", s=22)
right.axhline(0, color="0.6", linewidth=0.8, zorder=0)
right.set_title(f"use and need (correlation {np.corrcoef(use.ravel(), harm.ravel())[0, 1]:.2f})")
right.set(xlabel="% of the tale's tokens that the expert reads", ylabel="nats per token")
figure.colorbar(points, ax=right, label="layer", pad=0.01)
keep(figure, "ablation.png")

# %% [markdown]
# The text changes too. Greedy, so that nothing but the edit differs.

# %%
worst_layer, worst = divmod(int(harm.argmax()), E)
changed = fj.set_layer(params, worst_layer, without(fj.layer(params, worst_layer), worst))
edited = dataclasses.replace(model, params=changed)
PROMPT = "The king had three sons, and the youngest"
for title, one in (("intact", model), (f"without expert {worst} of layer {worst_layer}", edited)):
    print(f"{title}:\n  {PROMPT}{fj.generate(one, [PROMPT], max_tokens=40, temperature=0.0)[0]}\n")

# %% [markdown]
# ## A gradient through a mixture of experts
#
# Weights are frozen integers, but activations have gradients. To start in the middle of the model, make a smaller model
# of its last layer alone: hidden states take the place of the embedding, and "token" t is row t.

# %%
START = L - 1
PROMPT = "The door opened, and in came a"
ids = jnp.asarray(tokenizer.encode(PROMPT), jnp.int32)
logits, aux = forward(params, ids[None], cfg=cfg, with_aux=True)
hidden = aux.hidden[START, 0]  # [T, D], what goes into the last layer
rest = dataclasses.replace(
    cfg, num_layers=L - START, moe_layers=cfg.moe_layers[START:], sliding_windows=cfg.sliding_windows[START:]
)
tail = {
    "layers": jax.tree.map(lambda leaf: leaf[START:], params["layers"]),
    "norm": params["norm"],
    "lm_head": params["embed"].T,
}


def surprise(hidden, word):
    positions = jnp.arange(len(hidden), dtype=jnp.int32)[None]
    logits = fj.forward({"embed": hidden, **tail}, positions, rest)[0, -1]
    logprobs = jax.nn.log_softmax(logits)
    return -logprobs[word], logprobs


WORD = " wolf"
(word,) = tokenizer.encode(WORD)
study = jax.jit(jax.value_and_grad(surprise, has_aux=True))
(_, before), gradient = study(hidden, word)
print("same as the whole model:", np.allclose(before, jax.nn.log_softmax(logits[0, -1]), atol=1e-4))

# The slope along the gradient is its squared norm: a check that the chain through the router holds.
step = 1e-2 / jnp.linalg.norm(gradient)
(more, _), (less, _) = (study(hidden + sign * step * gradient, word)[0] for sign in (1, -1))
slope = (more - less) / (2 * step)
print(f"slope by finite difference {float(slope):.4f}, by jax.grad {float((gradient**2).sum()):.4f}")

# %% [markdown]
# Walk some way against the gradient, and the model expects a wolf.

# %%
far = 0.4 * jnp.linalg.norm(hidden[-1]) / jnp.linalg.norm(gradient)
(_, after), _ = study(hidden - far * gradient, word)
print(f"P({WORD.strip()}) {float(jnp.exp(before[word])):.4f} -> {float(jnp.exp(after[word])):.4f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.4), layout="constrained")
names = [tokenizer.decode([int(t)]).strip() for t in ids]
left.bar(range(len(names)), np.linalg.norm(gradient, axis=-1), color="tab:blue")
left.set(title=f'which positions could make it say "{WORD.strip()}"', ylabel="norm of the gradient")
left.set_xticks(range(len(names)), names)
likely = [int(i) for i in jnp.argsort(-jnp.maximum(before, after))[:8]]
for offset, logprobs, label in ((-0.2, before, "as it is"), (0.2, after, "after one step")):
    right.bar(np.arange(8) + offset, 100 * np.exp(np.asarray(logprobs)[likely]), width=0.4, label=label)
right.set(title=f"{PROMPT} ...", ylabel="probability, %")
right.set_xticks(range(8), [tokenizer.decode([i]).strip() for i in likely])
right.legend()
keep(figure, "gradient.png")
