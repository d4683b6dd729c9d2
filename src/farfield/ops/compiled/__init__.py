"""The arithmetic of the operators in C++, built by the machine's own compiler on first use; CPU only, never needed."""
