"""How a tensor becomes bytes: formats, their arithmetic, the operators in graphs."""
