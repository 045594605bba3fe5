//go:build unix

package cpu

import (
	"syscall"
	"time"
)

// processorTime is the user and system time that the process has had on all cores.
func processorTime() time.Duration {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return 0
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
