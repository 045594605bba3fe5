//go:build cuda

package main

import (
	"trainerd/kernels"
	"trainerd/kernels/cuda"
)

// cudaBuilt says whether this binary holds the CUDA device.
const cudaBuilt = true

func openCUDA(n int) (kernels.Device, error) {
	d, err := cuda.Open(n, cuda.Options{})
	if err != nil {
		return nil, err // not d: a nil *cuda.Device is not a nil kernels.Device
	}
	return d, nil
}
