"""Inputs without number for whatever reads what others wrote: `make fuzz`.

    script.py     inputs that are scripts: lists of operations as bytes
    target.py     what a target is, and what counts as a finding whatever it is
    campaign.py   many inputs from one seed, guided by what they reach
    client.py     a server that means harm, and our client
    server.py     peers that send, and our server
    directory.py  a directory of names in memory that changes under its readers
    control.py    callers of the control socket
    config.py     configuration files
    targets.py    all of them
    __main__.py   the command line

An input is bytes. Those of one seed are always the same, so a finding comes again with the seed;
its input is written to a file, too, which can be run alone.

Mutations know the grammar of what they change, and keep most of its sense: in conversations with
descriptors, cuts and turns that finds more than bytes at random. *Rejected:* Atheris, which knows
bytes only, has a loop of its own that no count and no leak check fits into, and is not possible
for every Python.
"""
