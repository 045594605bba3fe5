//go:build !linux

package storage

import "errors"

func exchangeNames(string, string) error { return errors.ErrUnsupported }
