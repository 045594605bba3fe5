package server

import (
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/labstack/echo/v4"

	"trainerd/internal/fault"
	"trainerd/trainer"
)

// defaultLease is how long a lease lasts that does not say.
const defaultLease = 10 * time.Minute

type leaseRequest struct {
	Holder string `json:"holder"`
	TTL    string `json:"ttl"` // a Go duration; "" is 10m
}

type renewRequest struct {
	TTL string `json:"ttl"`
}

type leaseList struct {
	Leases []trainer.Lease `json:"leases"`
}

// ttl reads a duration of a body, "" as the default.
func ttl(text string, def time.Duration) (time.Duration, error) {
	if text == "" {
		return def, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		return 0, fault.BadField("ttl", strconv.Quote(text), `a duration such as "10m"`)
	}
	return d, nil
}

// leasePath reads job and step of a path.
func (s *Server) leasePath(c echo.Context) (*trainer.Job, int64, error) {
	job, err := s.job(c)
	if err != nil {
		return nil, 0, err
	}
	step, err := pathInt(c, "step")
	return job, step, err
}

func (s *Server) takeLease(c echo.Context) error {
	job, step, err := s.leasePath(c)
	if err != nil {
		return err
	}
	var in leaseRequest
	if err := s.decodeJSON(c, &in); err != nil {
		return err
	}
	d, err := ttl(in.TTL, defaultLease)
	if err != nil {
		return err
	}
	l, err := job.Lease(c.Request().Context(), step, in.Holder, d)
	if err != nil {
		return err
	}
	c.Response().Header().Set("Location", fmt.Sprintf("/v1/jobs/%s/checkpoints/%d/leases/%s", job.ID, step, l.ID))
	return c.JSON(http.StatusCreated, l)
}

func (s *Server) listLeases(c echo.Context) error {
	job, step, err := s.leasePath(c)
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, leaseList{Leases: job.Leases(step)})
}

func (s *Server) renewLease(c echo.Context) error {
	job, step, err := s.leasePath(c)
	if err != nil {
		return err
	}
	var in renewRequest
	if err := s.decodeJSON(c, &in); err != nil {
		return err
	}
	d, err := ttl(in.TTL, defaultLease)
	if err != nil {
		return err
	}
	l, err := job.Renew(step, c.Param("lease"), d)
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, l)
}

func (s *Server) endLease(c echo.Context) error {
	job, step, err := s.leasePath(c)
	if err != nil {
		return err
	}
	if err := job.Release(step, c.Param("lease")); err != nil {
		return err
	}
	return c.NoContent(http.StatusNoContent)
}
