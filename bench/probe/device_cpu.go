//go:build !cuda

package main

import (
	"errors"

	"trainerd/kernels"
)

func openCUDA(int) (kernels.Device, error) {
	return nil, errors.New("this binary was built without CUDA (build tag cuda)")
}
