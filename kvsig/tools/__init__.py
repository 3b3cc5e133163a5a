"""What the commands of ``kvsig`` are made of: the demo, the benchmark, the calibration, reporting."""
