"""How new weights get into the servers: one process controls (session), any number of processes send their part.

    distributed   every sender broadcasts buckets to the servers (channel); no rank and no disk ever holds the whole model
    disk          every sender writes to a directory that all servers read; for servers that no process group reaches

Both are used as begin(), any number of senders, then finish() or abandon().
"""
