"""DiffuserLite: plans refined level by level with rectified flow."""
