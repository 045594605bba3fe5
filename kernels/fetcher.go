package kernels

import "gorgonia.org/tensor"

// Fetcher is a Device that need not be waited for at every download.
type Fetcher interface {
	// Fetch is Download later: dst holds what src holds after the operations
	// before it, once the next Sync has returned nil. Until then dst belongs to the device.
	Fetch(dst *tensor.Dense, src Buffer) error
}
