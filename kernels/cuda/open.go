package cuda

import (
	"fmt"

	"trainerd/internal/fault"
)

// found is what Open learnt about the machine before it took a card.
type found struct {
	index         int    // the card asked for
	status        int    // result of cuInit; -1: no driver library
	why           string // the loader's words, with status -1
	driver, built int    // CUDA versions of the driver and of the toolkit this binary was built with, as 1000*major + 10*minor
	cards         int
	model         string
	major, minor  int // compute capability
}

// Results of cuInit that have a cure worth naming.
var initMeanings = map[int]string{
	100: "no CUDA card is visible",
	101: "the card's ordinal is not valid",
	35:  "the driver is older than this library",
	802: "the system is not ready yet (is the fabric manager running?)",
	803: "kernel driver and user library are of different versions; reload the driver or reboot",
	804: "this card does not support the compatibility library in use",
	999: "the driver reports an unknown error (is /dev/nvidia-uvm there?)",
}

// checkDriver says why there is no usable driver, or nil.
func (f found) checkDriver() error {
	name := fmt.Sprintf("cuda:%d", f.index)
	switch {
	case f.status < 0:
		return fault.New(fault.Unavailable, "no_driver", "open %s: no NVIDIA driver: %s", name, f.why)
	case f.status != 0:
		why := initMeanings[f.status]
		if why == "" {
			why = "see the CUDA documentation of that code"
		}
		return fault.New(fault.Unavailable, "no_driver", "open %s: the NVIDIA driver does not start, cuInit gives %d: %s", name, f.status, why)
	case f.driver/1000 < f.built/1000:
		return fault.New(fault.Unavailable, "driver_too_old", "open %s: the driver supports CUDA %s, this binary was built with CUDA %s: expected a driver for CUDA %d.0 or newer",
			name, version(f.driver), version(f.built), f.built/1000)
	case f.cards == 0:
		return fault.New(fault.Unavailable, "no_driver", "open %s: the driver sees no card", name)
	case f.index < 0 || f.index >= f.cards:
		return fault.BadField("device", name, cardNames(f.cards))
	}
	return nil
}

// checkCard says why the card cannot be used, or nil.
func (f found) checkCard() error {
	if f.major < 8 {
		return fault.New(fault.Unavailable, "card_too_old", "open cuda:%d: %s has compute capability %d.%d, expected 8.0 or newer (bfloat16 matrix units)", f.index, f.model, f.major, f.minor)
	}
	return nil
}

// noCode says that the kernels hold nothing for the card.
func (f found) noCode(module string, err error) error {
	return fault.New(fault.Unavailable, "no_kernels", "open cuda:%d: %s holds no code for %s (compute capability %d.%d), expected sm_80, sm_90a or PTX that the driver compiles; rebuild with make kernels: %w",
		f.index, module, f.model, f.major, f.minor, err)
}

func version(v int) string { return fmt.Sprintf("%d.%d", v/1000, v%1000/10) }

func cardNames(n int) string {
	if n == 1 {
		return "cuda:0, the only card of this machine"
	}
	return fmt.Sprintf("cuda:0 to cuda:%d", n-1)
}
