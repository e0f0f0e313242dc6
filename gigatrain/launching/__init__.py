"""From a recipe and a site to a running job: Slurm, torchrun over hosts, Kubernetes; and what happens to a job afterwards. Free of torch."""
