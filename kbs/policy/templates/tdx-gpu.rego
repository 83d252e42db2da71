# Resource policy for TDX guests with GPUs in confidential-computing mode.
#
# Reference values: gpu_count (a number) and gpu_driver_versions (a list of texts), by
# `kbs reference add`. While they are not in force, nothing is allowed.
#
# input: claims of the guest's token, made anew for each request from verified facts.
# data:  {"plugin": "resource", "resource-path": [repository, type, tag], "query": {}}
package policy

import rego.v1

default allow := false

cpu := input.submods.cpu0

evidence := cpu["ear.veraison.annotated-evidence"]

gpus := [submod | submod := input.submods[name]; startswith(name, "gpu")]

allow if {
	data.plugin == "resource"
	cpu["ear.status"] == "affirming"
	evidence.tdx.td_attributes.debug == false
	evidence.tdx.tcb_status == "UpToDate"

	# A guest that nobody can log in to, which says itself that confidential computing is on.
	evidence.cai.guest.profile == "sealed"
	evidence.cai.guest.cc_feature == "on"
	evidence.cai.guest.devtools == "off"

	# Exactly as many GPUs as expected, each with a driver that is known.
	count(gpus) > 0
	count(gpus) == query_reference_value("gpu_count")
	every gpu in gpus {
		gpu["ear.veraison.annotated-evidence"].nvidia.config.driver_version in query_reference_value("gpu_driver_versions")
	}

	# Every part, switches too, is affirming.
	every submod in input.submods {
		submod["ear.status"] == "affirming"
	}
}
