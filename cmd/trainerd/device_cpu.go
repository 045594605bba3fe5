//go:build !cuda

package main

import (
	"fmt"

	"trainerd/internal/fault"
	"trainerd/kernels"
)

// cudaBuilt says whether this binary holds the CUDA device.
const cudaBuilt = false

func openCUDA(n int, _ deviceOptions) (kernels.Device, error) {
	return nil, fault.BadField("device", fmt.Sprintf("cuda:%d", n), "cpu or auto: this binary was built without CUDA (build tag cuda)")
}
