"""The backend and the lowering of the operators: the only room that touches Inductor."""
