"""What the scripts share: attention (cpu_kernels), loss (cross_entropy), optimizers (optim), checkpoints and more."""
