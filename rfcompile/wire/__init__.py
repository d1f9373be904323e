"""How bytes reach other ranks: policies, costs, collectives, transfers, the fake wire."""
