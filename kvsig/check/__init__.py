"""The registry against NVIDIA's headers and releases, and what a new release needs."""
