//go:build cuda

package main

import (
	"trainerd/kernels"
	"trainerd/kernels/cuda"
)

func openCUDA(n int) (kernels.Device, error) {
	d, err := cuda.Open(n, cuda.Options{})
	if err != nil {
		return nil, err
	}
	return d, nil
}
