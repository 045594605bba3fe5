//go:build cuda

package main

import (
	"path/filepath"

	"trainerd/kernels"
	"trainerd/kernels/cuda"
)

// cudaBuilt says whether this binary holds the CUDA device.
const cudaBuilt = true

func openCUDA(n int, o deviceOptions) (kernels.Device, error) {
	options := cuda.Options{Timed: o.algorithms != algorithmsFirst, Attention: o.attention}
	if o.data != "" {
		options.Choices = filepath.Join(o.data, "cuda-algorithms.json")
	}
	d, err := cuda.Open(n, options)
	if err != nil {
		return nil, err // not d: a nil *cuda.Device is not a nil kernels.Device
	}
	return d, nil
}
