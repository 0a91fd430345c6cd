"""Where bytes are: the ledger, the plan, residency, leases, streaming."""
