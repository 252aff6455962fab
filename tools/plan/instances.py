"""What Trainium instances can do at their best, and the share of that which a step is assumed to get.

Sources, all of AWS's Neuron documentation (https://awsdocs-neuron.readthedocs-hosted.com, read at SDK 2.32):

- [trn1] about-neuron/arch/neuron-hardware/trn1-arch: chips, 190 bf16 and 47.5 fp32 TFLOPS and 32 GiB a chip,
  NeuronLink 384 and 768, EFA 800 and 1,600 Gbps. The memory bandwidth is 820 GiB/s in this page and 820 GB/s
  in the NKI architecture guide; the smaller one is used.
- [trn2] about-neuron/arch/neuron-hardware/trn2-arch: 667 bf16 and 181 fp32 TFLOPS, 96 GiB and 2.9 TB/s a
  chip, NeuronLink within an instance 1,024 GB/s a chip (and a trn1's 384), EFA 3,200 Gbps. Two cores are one
  rank (LNC=2, the default): 4 ranks a chip.
- [nccom] tools/neuron-sys-tools/nccom-test: measured all-reduces and all-gathers. The page says that they may
  be out of date, and names no instance type; 32 ranks an instance are a trn1's.
- [inter] neuron-runtime/explore/internode-collective-comm: algorithms and latencies between trn2 instances.

Two figures are not verified: that trn1n's 768 are GB/s a chip too (the column in [trn1] has lost its
heading), and the prices (PRICE_SOURCE).
"""

from dataclasses import dataclass

from parallel.runtime.peaks import NEURONCORE_V2, TWO_NEURONCORES_V3

GIB = 2**30
PRICE_SOURCE = (
    "on demand, Linux, us-east-1, as others quoted AWS's list (trn1 June 2026, trn1n 2024); "
    "AWS's own page could not be read"
)


@dataclass(frozen=True)
class Instance:
    """An instance type. A core is what one rank runs on.

    FLOP/s, bytes and bytes/s are those of one core, except `network_bandwidth`, which is that of the instance
    in each direction. `link_bandwidth` is the chip's NeuronLink divided by its cores. `price` is USD an hour
    (PRICE_SOURCE), or None where no list price was found.
    """

    cores: int
    bf16_flops: float
    fp32_flops: float
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    price: float | None


INSTANCES = {
    "trn1.32xlarge": Instance(
        cores=32,
        bf16_flops=NEURONCORE_V2.bf16,
        fp32_flops=NEURONCORE_V2.fp32,
        memory_bytes=32 * GIB // 2,
        memory_bandwidth=820e9 / 2,
        link_bandwidth=384e9 / 2,
        network_bandwidth=800e9 / 8,
        price=21.50,
    ),
    "trn1n.32xlarge": Instance(
        cores=32,
        bf16_flops=NEURONCORE_V2.bf16,
        fp32_flops=NEURONCORE_V2.fp32,
        memory_bytes=32 * GIB // 2,
        memory_bandwidth=820e9 / 2,
        link_bandwidth=768e9 / 2,
        network_bandwidth=1600e9 / 8,
        price=24.78,
    ),
    "trn2.48xlarge": Instance(
        cores=64,
        bf16_flops=TWO_NEURONCORES_V3.bf16,
        fp32_flops=TWO_NEURONCORES_V3.fp32,
        memory_bytes=96 * GIB // 4,
        memory_bandwidth=2.9e12 / 4,
        link_bandwidth=1024e9 / 4,
        network_bandwidth=3200e9 / 8,
        price=None,
    ),
}


@dataclass(frozen=True)
class Assumptions:
    """One end of the range: shares of an instance's figures, and seconds.

    `link_latency` and `network_latency`: to a message's first byte. `trace_operation`: in which the host
    traces an operation of a graph. `replay_graph` and `replay_tensor`: in which it replays a graph, beside
    what it needs for each of its inputs and outputs.
    """

    products: float
    memory: float
    link: float
    network: float
    link_latency: float
    network_latency: float
    trace_operation: float
    replay_graph: float
    replay_tensor: float


# One set for all instances, models and topologies. The ends of the range come from:
#
# products         AWS's Llama-2 7B rows. With the other constants in the middle of their ranges, the products
#                  get 0.53 to 0.61 of the peak there. The range is 0.08 wider below and 0.04 above, for other
#                  shapes. Time that softmax, norms and casts take from products is included.
# memory           No measurement was found. Streams of HBM seldom reach more than 0.9, and strided ones fall
#                  to 0.6.
# link             [nccom] 41 to 53 GB/s a rank, of trn1's 192, within an instance in messages of at least
#                  16 MB.
# network          [nccom] 0.4 of EFA for one all-reduce of 128 MB among 64 ranks of two instances. A step has
#                  several groups at once, which may fill EFA up to the overhead of protocols.
# link_latency     [nccom] 6 us (a newer example) to 150 us (an older one) for 1 kB among 32 ranks.
# network_latency  [inter] 15 us a hop, 2 log2(16) hops; [nccom] 1.3 ms for up to 1 MB among 64 ranks of two
#                  instances.
# trace_operation  Measured, on other processors than a Trainium's host has. Two cores of an Intel Xeon
#                  (family 6, model 207), 2026-11-26, torch_xla 2.9.0: processor time of mark_step in a step
#                  of the tiny model with 2 to 32 layers, divided by its instructions in bench_compile. 10 us
#                  is the least, 18 us the largest median; others used the cores too. A server with an H200,
#                  Llama 3 8B: 10 to 14 us.
# replay_graph     The same steps replayed, with 106 to 1,216 inputs and outputs. Fast: a line through the
# replay_tensor    least processor times. Slow: one through the medians on the clock, with waits for a core.
FAST = Assumptions(
    products=0.65,
    memory=0.9,
    link=0.275,
    network=0.9,
    link_latency=6e-6,
    network_latency=120e-6,
    trace_operation=10e-6,
    replay_graph=0.5e-3,
    replay_tensor=5e-6,
)
SLOW = Assumptions(
    products=0.45,
    memory=0.6,
    link=0.21,
    network=0.4,
    link_latency=150e-6,
    network_latency=1300e-6,
    trace_operation=18e-6,
    replay_graph=1.7e-3,
    replay_tensor=18e-6,
)
IDEAL = Assumptions(
    products=1,
    memory=1,
    link=1,
    network=1,
    link_latency=0,
    network_latency=0,
    trace_operation=0,
    replay_graph=0,
    replay_tensor=0,
)
