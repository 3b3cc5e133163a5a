"""What the commands of ``kvsig`` are made of: demo, benchmark, calibration, reporting."""
