"""Rounds over clients: sampling, partitions, quorum, the ledger, and the engines that carry messages."""
