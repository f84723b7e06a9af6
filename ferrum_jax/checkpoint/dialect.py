"""What a checkpoint really holds: which modules are packed, how, and in which version, decided from the data.

Everything but the packed words themselves is read and checked here, before any device memory is touched: headers,
zero points, group indices, scales and unquantised tensors. Metadata only breaks ties; where it disagrees with the
data, that is a loud warning; where the data contradicts itself, an error.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ferrum_jax.checkpoint.files import CheckpointFiles, TensorReader
from ferrum_jax.config import ModelConfig, QuantConfig
from ferrum_jax.errors import CheckpointError, ShapeError
from ferrum_jax.plan import Format
from ferrum_jax.sources import Experts, Linear, Vector, layer_sources, other_names, top_sources
from ferrum_kernels.bits import SUPPORTED_BITS, unpack, words_for
from ferrum_kernels.gptq_format import input_order

FLOATS = ("F32", "F16", "BF16")
FLOAT16_MAX = 65504.0
BATCH = 256  # modules whose small tensors are read ahead of their examination
POWERS_OF_TWO = tuple(2**i for i in range(3, 16))  # what quantising tools offer as group sizes


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The findings.

    Attributes:
      version: "gptq" (zero points stored minus one), "gptq_v2", or None when nothing is quantised.
      formats: packed modules by canonical name.
      names: canonical tensor name -> name in the files.
      warnings: sentences for the user.
    """

    version: str | None
    formats: dict[str, Format]
    names: dict[str, str]
    warnings: tuple[str, ...]

    def format_of(self, module: str, k: int) -> Format | None:
        """The format of a module, None for one that is not packed; the `format_of` of `make_plan`."""
        return self.formats.get(module)


def read_dialect(
    files: CheckpointFiles,
    cfg: ModelConfig,
    checkpoint_format: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Dialect:
    """Examine a checkpoint.

    Args:
      files: its tensor table.
      cfg: its configuration.
      checkpoint_format: "gptq" or "gptq_v2" to settle what the files leave open; None lets them decide.
      progress: called with the bytes of each tensor read.

    Returns:
      Dialect.

    Raises:
      CheckpointError: a tensor is missing, unknown, misshapen or not finite, g_idx is impossible, or the zero points
        contradict each other.
    """
    scan = _Scan(files, cfg)
    with files.reader(scattered=True) as reader:
        scan.reader, scan.progress = reader, progress
        sources = list(_sources(cfg))
        for start in range(0, len(sources), BATCH):
            scan.prefetch(sources[start : start + BATCH])
            for source in sources[start : start + BATCH]:
                scan.visit(source)
        scan.leftovers()
    version = _version(scan, cfg, checkpoint_format)
    formats = {
        module: dataclasses.replace(found, sym=scan.constant[module] == version)
        for module, found in scan.formats.items()
    }
    for module, found in formats.items():
        declared = scan.declared(module)
        if declared is not None and declared.sym and not found.sym:
            scan.warn("zero points are not symmetric although the metadata says sym=true", module)
    return Dialect(version, formats, scan.names, tuple(scan.sentences()))


def _sources(cfg: ModelConfig) -> Iterator[Vector | Linear]:
    def walk(node: Any) -> Iterator[Vector | Linear]:
        if isinstance(node, dict):
            for child in node.values():
                yield from walk(child)
        elif isinstance(node, Experts):
            yield from node.experts
        else:
            yield node

    yield from walk(top_sources(cfg))
    for index in range(cfg.num_layers):
        yield from walk(layer_sources(cfg, index))


class _Scan:
    """One pass over the modules; collects formats, evidence and warnings."""

    reader: TensorReader
    progress: Callable[[int], None]

    def __init__(self, files: CheckpointFiles, cfg: ModelConfig) -> None:
        self.files, self.cfg = files, cfg
        self.names: dict[str, str] = {}
        self.formats: dict[str, Format] = {}
        self.constant: dict[str, str | None] = {}  # module -> version in which its zero points are symmetric
        self.notes: dict[str, list[str]] = {}

    def warn(self, what: str, module: str) -> None:
        self.notes.setdefault(what, []).append(module)

    def sentences(self) -> Iterator[str]:
        for what, modules in self.notes.items():
            more = f" and {len(modules) - 1} more modules" if len(modules) > 1 else ""
            yield f"{what}: {modules[0]}{more}. The data decides."

    def find(self, name: str) -> str | None:
        """The name under which a tensor is stored, remembered for loading."""
        spellings = (name,) if name in self.files.tensors else other_names(name)
        for spelling in spellings:
            if spelling in self.files.tensors:
                self.names[name] = spelling
                return spelling
        return None

    def prefetch(self, sources: list[Vector | Linear]) -> None:
        modules = [module for source in sources if isinstance(source, Linear) for module in source.modules]
        found = (self.find(f"{module}.{part}") for module in modules for part in ("scales", "qzeros", "g_idx"))
        self.reader.prefetch(name for name in found if name is not None)

    def read(self, stored: str) -> np.ndarray:
        self.progress(self.files.tensors[stored].nbytes)
        return self.reader[stored]

    def declared(self, module: str) -> QuantConfig | None:
        """What the metadata says of a module; routers are never quantised."""
        quant = self.cfg.quant
        return None if quant is None or module.endswith(".mlp.gate") else quant.for_module(module)

    def missing(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.files.folder} holds no tensor {name!r}, which a {self.cfg.model_type} of these sizes needs. "
            f"The checkpoint is incomplete or its config.json belongs to another model; download it again."
        )

    def expect(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> str:
        stored = self.find(name)
        if stored is None:
            raise self.missing(name)
        info = self.files.tensors[stored]
        if info.dtype not in dtypes or info.shape != shape:
            raise CheckpointError(
                f"{info.file.name} stores {stored!r} as {info.dtype}{list(info.shape)}; config.json and the format "
                f"expect {' or '.join(dtypes)}{list(shape)}. The files do not belong together or are damaged."
            )
        return stored

    def largest(self, stored: str) -> float:
        """The largest magnitude in a tensor of floats, all of which must be finite."""
        self.progress(self.files.tensors[stored].nbytes)
        largest = 0.0
        for _, block in self.reader.blocks(stored):
            top = largest_float(block)
            if not np.isfinite(top):
                bad = int((~np.isfinite(self.reader[stored])).sum())
                raise CheckpointError(
                    f"{stored!r} holds {bad} values that are NaN or infinite, so every text it writes would be broken. "
                    f"Download the checkpoint again or ask its publisher."
                )
            largest = max(largest, top)
        return largest

    def weights(self, stored: str) -> None:
        if self.largest(stored) > FLOAT16_MAX and self.cfg.dtype == "float16":
            raise CheckpointError(
                f"{stored!r} holds values beyond {FLOAT16_MAX:.0f}, the largest that float16 can hold. "
                f"Load it with dtype='bfloat16' or 'float32'."
            )

    def scales(self, stored: str) -> None:
        self.largest(stored)
        if self.files.tensors[stored].dtype == "F16":
            return
        values = self.reader[stored]
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), values.astype(np.float32)):
            raise CheckpointError(
                f"{stored!r} is stored as {values.dtype} with values that float16 cannot hold exactly; GPTQ tools "
                f"write float16 scales. Quantise again, or convert the scales knowingly."
            )

    def visit(self, source: Vector | Linear) -> None:
        if isinstance(source, Vector):
            self.weights(self.expect(source.name, FLOATS, source.shape))
            return
        (module,), (n,) = source.modules, source.n
        packed, plain = self.find(f"{module}.qweight"), self.find(f"{module}.weight")
        if packed and plain:
            raise CheckpointError(
                f"{self.files.folder} holds both {packed!r} and {plain!r}: one linear layer, twice. "
                f"Remove the one that does not belong."
            )
        if packed and source.round_to is not None:
            raise CheckpointError(
                f"{packed!r} is quantised already, so lm_head_bits={source.round_to} has nothing to round. "
                f"Leave lm_head_bits out."
            )
        declared = None if source.round_to is not None else self.declared(module)
        if packed:
            self.visit_packed(module, source.k, n, declared)
        elif plain:
            self.weights(self.expect(f"{module}.weight", FLOATS, (n, source.k)))
            if declared is not None:
                self.warn("the metadata says quantised, the files hold plain weights", module)
        else:
            raise self.missing(f"{module}.weight" if declared is None else f"{module}.qweight")

    def visit_packed(self, module: str, k: int, n: int, declared: QuantConfig | None) -> None:
        for part in ("qzeros", "scales"):
            if self.find(f"{module}.{part}") is None:
                raise self.missing(f"{module}.{part}")
        rows = (*self.files.tensors[self.names[f"{module}.qweight"]].shape, 0)[0]
        bits = self.bits_of(module, k, n, rows, None if declared is None else declared.bits)
        self.expect(f"{module}.qweight", ("I32",), (words_for(k, bits), n))
        groups = (*self.files.tensors[self.names[f"{module}.scales"]].shape, 0)[0]
        self.scales(self.expect(f"{module}.scales", FLOATS, (groups, n)))
        zeros = self.read(self.expect(f"{module}.qzeros", ("I32",), (groups, words_for(n, bits))))
        g_idx = None
        if self.find(f"{module}.g_idx"):
            g_idx = self.read(self.expect(f"{module}.g_idx", ("I32", "I64"), (k,))).astype(np.int64)
        group_size = self.group_size_of(module, k, groups, g_idx, None if declared is None else declared.group_size)
        try:
            order = None if g_idx is None else input_order(g_idx, group_size)
        except ShapeError as error:
            raise CheckpointError(f"{module}.g_idx is impossible: {error} The file is damaged.") from error
        if declared is None:
            self.warn("packed although the metadata does not say so", module)
        elif declared.bits != bits:
            self.warn(f"packed with {bits} bits, the metadata says {declared.bits}", module)
        elif group_size != (k if declared.group_size == -1 else min(declared.group_size, k)):
            self.warn(f"packed in groups of {group_size}, the metadata says {declared.group_size}", module)
        if order is not None and declared is not None and not declared.desc_act:
            self.warn("g_idx permutes the inputs, the metadata says desc_act=false", module)
        name = None if order is None else hashlib.blake2b(order.tobytes(), digest_size=8).hexdigest()
        self.formats[module] = Format(bits, group_size, order=name)
        self.constant[module] = _constant(zeros.view(np.uint32), bits, n)

    def bits_of(self, module: str, k: int, n: int, rows: int, declared: int | None) -> int:
        columns = (0, *self.files.tensors[self.names[f"{module}.qzeros"]].shape)[-1]
        fit = [b for b in SUPPORTED_BITS if words_for(k, b) == rows and words_for(n, b) == columns]
        if declared in fit:
            return declared
        if len(fit) == 1:
            return fit[0]
        found = f"{module}.qweight has {rows} rows of words and its qzeros {columns} columns for a [{k}, {n}] layer"
        if not fit:
            raise CheckpointError(
                f"{found}; that is no GPTQ layer of 2, 3, 4 or 8 bits. The config.json belongs to another model, or "
                f"the file is damaged."
            )
        raise CheckpointError(f"{found}; bits could be any of {fit}. Say which in quantize_config.json (bits).")

    def group_size_of(self, module: str, k: int, groups: int, g_idx: np.ndarray | None, declared: int | None) -> int:
        declared = k if declared == -1 else declared
        if declared is not None and groups == -(-k // declared):
            return min(declared, k)
        if groups == 1:
            return k
        if g_idx is not None and groups and (size := int((g_idx == 0).sum())) and -(-k // size) == groups:
            return size
        fit = {size for size in (k // max(groups, 1), *POWERS_OF_TWO) if size and -(-k // size) == groups}
        if len(fit) == 1:
            return fit.pop()
        found = f"{module}.scales has {groups} rows for {k} inputs"
        if not fit:
            raise CheckpointError(f"{found}; no group size gives that. Download the checkpoint again.")
        raise CheckpointError(
            f"{found}; group_size could be any of {sorted(fit)}. Say which in quantize_config.json (group_size)."
        )

    def leftovers(self) -> None:
        """Tensors that nothing asked for: harmless ones are known, all others are refused."""
        used = set(self.names.values())
        unknown = []
        for name in self.files.tensors.keys() - used:
            if name.endswith((".rotary_emb.inv_freq", ".masked_bias")):
                continue
            if name == "lm_head.weight" and self.cfg.tie_word_embeddings:
                continue
            # AutoGPTQ gave every linear layer a bias, zero where the model has none.
            if name.endswith(".bias") and not self.read(name).any():
                continue
            unknown.append(name)
        if unknown:
            unknown.sort()
            raise CheckpointError(
                f"{self.files.folder} holds {len(unknown)} tensors that a {self.cfg.model_type} does not have, such as "
                f"{', '.join(unknown[:3])}. Its config.json belongs to another model, or the architecture has been "
                f"changed."
            )


def largest_float(values: np.ndarray) -> float:
    """The largest magnitude among floats of 16 or 32 bits; infinite or NaN if one of them is.

    >>> largest_float(np.array([0.5, -2.0, 1.0], np.float16))
    2.0
    """
    # Without its sign bit a float sorts as an integer, infinities and NaN last; ten times as fast as isfinite.
    bits = values.view(f"u{values.itemsize}")
    top = (bits & bits.dtype.type(2 ** (8 * values.itemsize - 1) - 1)).max(initial=0)
    return float(top.view(values.dtype))


def _constant(zeros: np.ndarray, bits: int, n: int) -> str | None:
    """The version in which all zero points are 2**(bits - 1), or None when they vary."""
    middle = 2 ** (bits - 1)
    if n * bits % 32 == 0 and 32 % bits == 0:  # words without padding: equal codes are equal words
        ones = (2**32 - 1) // (2**bits - 1)
        found = {(middle - 1) * ones: "gptq", middle * ones: "gptq_v2"}.get(int(zeros[0, 0]))
        return found if (zeros == zeros[0, 0]).all() else None
    codes = unpack(zeros, bits, n, axis=-1)
    low, high = int(codes.min()), int(codes.max())
    return {middle - 1: "gptq", middle: "gptq_v2"}.get(low) if low == high else None


def _version(scan: _Scan, cfg: ModelConfig, chosen: str | None) -> str | None:
    if not scan.formats:
        return None
    declared = None if cfg.quant is None else cfg.quant.checkpoint_format
    found = {version: module for module, version in scan.constant.items() if version is not None}
    if chosen is not None:
        return chosen
    if len(found) == 2:
        raise CheckpointError(
            f"the zero points contradict each other: those of {found['gptq']} are stored minus one (gptq), those of "
            f"{found['gptq_v2']} as they are (gptq_v2). Say which with checkpoint_format='gptq' or 'gptq_v2'."
        )
    if found:
        (version, module), *_ = found.items()
        if declared not in (None, version):
            varying = next((name for name, constant in scan.constant.items() if constant is None), None)
            if varying is not None:
                raise CheckpointError(
                    f"the zero points of {module} look like {version}, the metadata says {declared}, and those of "
                    f"{varying} fit both. Say which with checkpoint_format='gptq' or 'gptq_v2'."
                )
            scan.warn(f"zero points are stored as {version}, the metadata says {declared}", module)
        return version
    if declared is None:
        module = next(iter(scan.formats))
        scan.warn("the metadata has no checkpoint_format and the zero points vary; read as gptq (v1)", module)
        return "gptq"
    return declared
