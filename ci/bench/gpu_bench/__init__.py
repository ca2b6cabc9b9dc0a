"""The parts of ci/bench/bench_gpu.py: what is measured, how, and where the numbers go."""
