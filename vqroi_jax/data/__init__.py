"""From a folder of MRIs to batches of regions of interest."""
