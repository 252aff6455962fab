"""What a Trainium instance can do at its best, by AWS's own figures, and which share of that a training step
is assumed to get.

Sources, all of AWS's Neuron documentation (https://awsdocs-neuron.readthedocs-hosted.com, read at SDK 2.32):

- [trn1] about-neuron/arch/neuron-hardware/trn1-arch: chips, 190 bf16 and 47.5 fp32 TFLOPS and 32 GiB a chip,
  NeuronLink 384 and 768, EFA 800 and 1,600 Gbps. The memory's 820 a second are GiB there and GB in the NKI
  architecture guide; the smaller is taken.
- [trn2] about-neuron/arch/neuron-hardware/trn2-arch: 667 bf16 and 181 fp32 TFLOPS, 96 GiB and 2.9 TB/s a
  chip, NeuronLink within an instance 1,024 GB/s a chip (and a trn1's 384), EFA 3,200 Gbps. Two cores are one
  rank (LNC=2, the default): 4 ranks a chip.
- [nccom] tools/neuron-sys-tools/nccom-test: measured all-reduces and all-gathers. The page says that they
  need not be up to date, and names no machine; 32 ranks an instance are a trn1's.
- [inter] neuron-runtime/explore/internode-collective-comm: algorithms and latencies between trn2 instances.

Not verified: that trn1n's 768 are GB/s a chip too (the column of [trn1] has lost its heading), and the prices
(PRICED).
"""

from dataclasses import dataclass

GIB = 2**30


PRICED = "on demand, Linux, us-east-1, as others quoted AWS's list (trn1 June 2026, trn1n 2024); AWS's own page could not be read"


@dataclass(frozen=True)
class Machine:
    """An instance type. A core is what a rank runs on.

    FLOP/s, bytes and bytes/s are of one core, `network_bandwidth` (each way) of the instance;
    `link_bandwidth` is the chip's NeuronLink divided by its cores. `price` is USD an hour (PRICED), or None
    where no list price was found.
    """

    cores: int
    bf16_flops: float
    fp32_flops: float
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    price: float | None


MACHINES = {
    "trn1.32xlarge": Machine(
        cores=32,
        bf16_flops=190e12 / 2,
        fp32_flops=47.5e12 / 2,
        memory_bytes=32 * GIB // 2,
        memory_bandwidth=820e9 / 2,
        link_bandwidth=384e9 / 2,
        network_bandwidth=800e9 / 8,
        price=21.50,
    ),
    "trn1n.32xlarge": Machine(
        cores=32,
        bf16_flops=190e12 / 2,
        fp32_flops=47.5e12 / 2,
        memory_bytes=32 * GIB // 2,
        memory_bandwidth=820e9 / 2,
        link_bandwidth=768e9 / 2,
        network_bandwidth=1600e9 / 8,
        price=24.78,
    ),
    "trn2.48xlarge": Machine(
        cores=64,
        bf16_flops=667e12 / 4,
        fp32_flops=181e12 / 4,
        memory_bytes=96 * GIB // 4,
        memory_bandwidth=2.9e12 / 4,
        link_bandwidth=1024e9 / 4,
        network_bandwidth=3200e9 / 8,
        price=None,
    ),
}


@dataclass(frozen=True)
class Assumed:
    """Shares of a machine's figures, and seconds before a message's first byte, at one end of the range."""

    products: float
    memory: float
    link: float
    network: float
    link_latency: float
    network_latency: float


# One set for all machines, models and topologies.
# products: from AWS's Llama-2 7B rows. With the other constants in the middle of their ranges these leave the
# products 0.53 to   0.61 of the peak; 0.08 less and 0.04 more are added for other shapes. What softmax, norms
# and casts hold up is in it. memory: no measurement was found. Streams of HBM seldom reach more than 0.9, and
# strided ones fall to 0.6. link: [nccom] 41 to 53 GB/s a rank within an instance, in messages of 16 MB and
# more, of trn1's 192. network: [nccom] 0.4 of EFA by one all-reduce of 128 MB among 64 ranks of two
# instances. Several groups at once, which is what a   step has, may fill it up to what protocols leave.
# link_latency: [nccom] 6 us (a newer example) to 150 us (an older one) for a message of 1 kB among 32 ranks.
# network_latency: [inter] 15 us a hop, 2 log2(16) hops; [nccom] 1.3 ms for up to 1 MB among 64 ranks of two
# instances.
FAST = Assumed(products=0.65, memory=0.9, link=0.275, network=0.9, link_latency=6e-6, network_latency=120e-6)
SLOW = Assumed(
    products=0.45, memory=0.6, link=0.21, network=0.4, link_latency=150e-6, network_latency=1300e-6
)
IDEAL = Assumed(products=1, memory=1, link=1, network=1, link_latency=0, network_latency=0)
