"""Which experts each token takes: tables, their store on this rank, their way to the ranks, files of them.

In: expert ids of an engine or of the actor. Out: RouteTable, and slices of it for this rank's rows and layers.
May import parallel; knows no model and no router.
"""
