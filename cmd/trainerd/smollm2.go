package main

import (
	"context"
	"errors"
)

func (d *demo) runSmolLM2(ctx context.Context) error { return errors.New("wip") }
