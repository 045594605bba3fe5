//go:build !unix

package cpu

import "time"

// processorTime is not known here; the benchmarks then report 0.
func processorTime() time.Duration { return 0 }
