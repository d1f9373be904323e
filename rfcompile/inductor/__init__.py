"""The only room that touches Inductor: the backend and the lowering of the operators."""
