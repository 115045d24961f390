"""`make gpu-check`: everything that is to be known of this code on an NVIDIA GPU, in one command."""
