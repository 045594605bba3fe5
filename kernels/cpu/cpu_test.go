package cpu

import (
	"testing"

	"trainerd/kernels"
	"trainerd/kernels/kerneltest"
)

func open(tb testing.TB, workers int) kernels.Device {
	tb.Helper()
	dev, err := New(workers)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := dev.Close(); err != nil {
			tb.Error(err)
		}
	})
	return dev
}

func TestDevice(t *testing.T) { kerneltest.Run(t, open(t, 2)) }
