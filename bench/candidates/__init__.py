"""Ways to do the read path's arithmetic on a CPU, one of which is kept in `htm_service.kernels`."""
