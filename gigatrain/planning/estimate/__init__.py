"""What a plan expects of its machines: seconds, bytes, watts and goodput of a step, from first principles and named constants. Free of torch.

Data flows one way:

    Workload (workload.py) x Cluster (cluster.py)
        -> Work            operations.py   every product, attention, pass over memory and transfer of a microbatch, by stage; the optimizer's; saved bytes
        -> seconds of each rates.py        max(launch, roofline with an efficiency that depends on the shape), by accelerator and dtype
                           collectives.py  alpha-beta by level: scale-up domain, rail, spine
                           stacks.py       what a software stack fuses, overlaps and launches: one record of named constants each
        -> Estimate        step.py         events of one step on streams; residency.py its peak memory by liveness; interval.py how sure that is
        -> Draw            energy.py       watts at the four boundaries, MWh, euros, tCO2
        -> Goodput         goodput.py      failures, checkpoints, spares: what of the wall-clock is retained work
    search.py ranks layouts by it; rows.py reads published measurements as workloads; ../expect.py does all of it for a Plan.
"""
