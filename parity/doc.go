// Package parity holds trainerd to PyTorch, transformers and TRL. It has no
// code of its own, only tests and what they read: goldens under testdata, made
// by parity/py/make_goldens.py (`make goldens`), and the weights of
// SmolLM2-135M-Instruct, fetched by `make test-parity`.
//
// The tolerances are the project's: log-probs within 1e-4 of transformers in
// float32; each parameter's gradient g within 1e-4*max(|g_ref|, 1e-3*|g_all|) of
// float64 autograd; losses of ten AdamW steps within 1e-5 relative. The tests of
// perturb_test.go show that these goldens can fail.
//
// parity/interop.sh (`make test-interop`) is the other direction: transformers
// loads what trainerd published.
package parity
