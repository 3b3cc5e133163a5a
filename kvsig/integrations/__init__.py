"""kvsig inside serving engines: one module for each, none of which is imported by kvsig itself."""
