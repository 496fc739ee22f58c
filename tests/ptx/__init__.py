"""Runs the PTX that Triton and nvcc produce, in numpy, on the tensors of a call: a check of kernels without a GPU.

What it models: the threads of a block in lockstep, with divergence and the waiting of `.sync` instructions for one
another; registers to the bit; param, global, shared, constant and local memory, each tensor with its exact bounds;
barriers. Blocks run one after another.

What it reports, as a `memory.Fault` with the line of the PTX and, where the compiler says it, that of the source:
  - an access out of the bounds of every allocation, misaligned, or in another space than the instruction says;
  - a read of what torch.empty or a kernel's shared memory had before anybody wrote it;
  - a race: two threads touch the same memory, one of them writes something else, and no barrier is between, which is
    bar.warp.sync within a warp and bar.sync within a block. Blocks have none between them;
  - a barrier that not all threads reach, as one of them waits elsewhere or has ended;
  - an instruction that it does not know.
And it counts, of a launch: instructions of warps, bytes of global memory, passes over the banks of shared memory beyond
the least (`machine.Counts`).

What it does not: time, caches, registers (ptxas), and the order in which warps run, for which races stand. Barriers of
a part of a block, atomics, and calls of functions, where one is reached, are unknown to it. Where the hardware
approximates (ex2.approx, div.full) results here are those of numpy; fma in float32 is rounded twice, first to float64,
and products and sums that ptxas may fuse are not. A tensor core multiplies what is cut to tf32; here it adds in
float64. Registers begin at zero. Shuffles order no memory, as the manual has it. A race whose writes leave the bits as
they were is not seen, nor is one of three threads of which the last that read hides another.
"""
