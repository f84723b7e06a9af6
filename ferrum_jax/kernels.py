"""The kernels under the name a user of ferrum_jax looks for: `from ferrum_jax.kernels import grouped_gptq_matmul`."""

from ferrum_kernels import Dispatch as Dispatch
from ferrum_kernels import GptqTensors as GptqTensors
from ferrum_kernels import MixedStack as MixedStack
from ferrum_kernels import PackedLinear as PackedLinear
from ferrum_kernels import TiledLinear as TiledLinear
from ferrum_kernels import batched_expert_matmul as batched_expert_matmul
from ferrum_kernels import default_implementation as default_implementation
from ferrum_kernels import dequantize as dequantize
from ferrum_kernels import dispatch_sorted as dispatch_sorted
from ferrum_kernels import expert_linear as expert_linear
from ferrum_kernels import from_blocks as from_blocks
from ferrum_kernels import from_gptq as from_gptq
from ferrum_kernels import gptq_matmul as gptq_matmul
from ferrum_kernels import grouped_gptq_matmul as grouped_gptq_matmul
from ferrum_kernels import is_packed as is_packed
from ferrum_kernels import is_weight as is_weight
from ferrum_kernels import round_to_nearest as round_to_nearest
from ferrum_kernels import tile as tile
from ferrum_kernels import to_blocks as to_blocks
from ferrum_kernels import to_gptq as to_gptq
from ferrum_kernels import untile as untile
