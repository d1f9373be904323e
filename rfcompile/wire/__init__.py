"""How bytes reach other ranks: policies, costs, collectives and transfers, the fake wire."""
